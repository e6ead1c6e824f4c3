"""The public surface, frozen. A changed row changes the code of users: it needs a line in CHANGELOG.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

import modernbert
import modernbert_kernels

PRETRAINED = {  # members of every model that `from_pretrained` loads
    "activation_checkpointing_disable": "(self)",
    "activation_checkpointing_enable": "(self, activation_checkpointing_kwargs=None, **options)",
    "base_model": "property",
    "device": "property",
    "dtype": "property",
    "from_pretrained": (
        "(folder_or_hub_id, *, dtype=None, device=None, revision=None, token=None, cache_dir=None, "
        "local_files_only=False, subfolder='', torch_dtype=None, device_map=None, **options)"
    ),
    "get_input_embeddings": "(self)",
    "gradient_checkpointing_disable": "(self)",
    "gradient_checkpointing_enable": "(self, gradient_checkpointing_kwargs=None, **options)",
    "is_activation_checkpointing": "property",
    "is_gradient_checkpointing": "property",
    "num_parameters": "(self, only_trainable=False, exclude_embeddings=False)",
    "resize_token_embeddings": "(self, vocab_size, *, pad_to_multiple_of=None)",
    "save_pretrained": (
        "(self, folder, *, format=None, state_dict=None, max_shard_size=None, is_main_process=True, **options)"
    ),
    "set_input_embeddings": "(self, value)",
}
MODELS = (
    "ColBERT",
    "Embedder",
    "Encoder",
    "MaskedLM",
    "MultipleChoice",
    "QuestionAnswering",
    "Reranker",
    "SequenceClassifier",
    "TokenClassifier",
)
FROZEN = {
    **{f"modernbert.{model}.{name}": row for model in MODELS for name, row in PRETRAINED.items()},
    "modernbert.ColBERT": "(encoder, tokenizer, dense, config)",
    "modernbert.ColBERT.default": "()",
    "modernbert.ColBERT.document_ids": "(self, texts)",
    "modernbert.ColBERT.document_tokens": "(self, ids, spans=(), *, truncate=True)",
    "modernbert.ColBERT.stream_documents": "(self, texts, *, batch_tokens=None, pool_factor=1)",
    "modernbert.ColBERT.encode_documents": (
        "(self, texts, *, batch_tokens=None, progress=None, devices=None, pool_factor=1)"
    ),
    "modernbert.ColBERT.encode_queries": ("(self, texts, *, batch_tokens=None, progress=None, devices=None)"),
    "modernbert.ColBERT.forward": "(self, batch, *, rows=None)",
    "modernbert.ColBERT.from_encoder": "(encoder, tokenizer, *, dim=128, config=None)",
    "modernbert.ColBERT.query_ids": "(self, texts)",
    "modernbert.ColBERT.query_tokens": "(self, ids, spans=())",
    "modernbert.ColBERT.tokenize_documents": "(self, texts, *, truncate=True, spans=True)",
    "modernbert.ColBERT.tokenize_queries": "(self, texts, *, spans=True)",
    "modernbert.Embedder": "(encoder, tokenizer, dense=(), config=None)",
    "modernbert.Embedder.document_ids": "(self, texts)",
    "modernbert.Embedder.encode": (
        "(self, texts, *, prompt_name=None, prompt=None, precision=None, ranges=None, batch_tokens=None, "
        "progress=None, devices=None)"
    ),
    "modernbert.Embedder.encode_documents": "(self, texts, *, batch_tokens=None, progress=None, devices=None)",
    "modernbert.Embedder.encode_queries": "(self, texts, *, batch_tokens=None, progress=None, devices=None)",
    "modernbert.Embedder.forward": "(self, batch, *, rows=None)",
    "modernbert.Embedder.max_length": "property",
    "modernbert.Embedder.query_ids": "(self, texts)",
    "modernbert.Embedder.tokenize": "(self, texts, *, prompt_name=None, prompt=None, spans=False)",
    "modernbert.Encoder": "(config)",
    "modernbert.Encoder.forward": (
        "(self, batch=None, attention_mask=None, rows=None, inputs_embeds=None, input_ids=None, return_dict=None)"
    ),
    "modernbert.Encoder.from_config": "(config)",
    "modernbert.Encoder.reset_parameters": "(self)",
    "modernbert.EncoderConfig": (
        "(vocab_size=50368, hidden_size=768, intermediate_size=1152, num_hidden_layers=22, "
        "num_attention_heads=12, hidden_activation='gelu', max_position_embeddings=8192, "
        "norm_eps=1e-05, norm_bias=False, attention_bias=False, mlp_bias=False, "
        "layer_pattern=('full_attention', 'sliding_attention', 'sliding_attention'), "
        "local_attention=128, global_rope_theta=160000.0, local_rope_theta=10000.0, "
        "embedding_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0, initializer_range=0.02, "
        "initializer_cutoff_factor=2.0, pad_token_id=None, cls_token_id=None, sep_token_id=None, "
        "bos_token_id=None, eos_token_id=None, decoder_bias=True, tie_word_embeddings=True, "
        "classifier_pooling='cls', classifier_activation='gelu', classifier_bias=False, "
        "classifier_dropout=0.0, *, others=<factory>)"
    ),
    "modernbert.EncoderConfig.changed": "(self, settings)",
    "modernbert.EncoderConfig.from_hf": "(hf)",
    "modernbert.EncoderConfig.get_text_config": "(self, decoder=False)",
    "modernbert.EncoderConfig.head_dim": "property",
    "modernbert.EncoderConfig.is_global": "(self, layer)",
    "modernbert.EncoderConfig.layer_types": "property",
    "modernbert.EncoderConfig.preset": "(name)",
    "modernbert.EncoderConfig.rope_theta": "(self, layer)",
    "modernbert.EncoderConfig.to_dict": "(self)",
    "modernbert.EncoderConfig.to_hf": "(self)",
    "modernbert.EncoderConfig.to_json_string": "(self)",
    "modernbert.EncoderConfig.window": "property",
    "modernbert.MaskedLM": "(encoder, *, head=None)",
    "modernbert.MaskedLM.config": "property",
    "modernbert.MaskedLM.forward": (
        "(self, batch=None, attention_mask=None, rows=None, labels=None, input_ids=None, num_items_in_batch=None)"
    ),
    "modernbert.MaskedLM.from_config": "(config)",
    "modernbert.MaskedLM.get_output_embeddings": "(self)",
    "modernbert.MaskedLM.loss": "(self, batch, labels, rows=None, *, reduction='mean')",
    "modernbert.MultipleChoice": "(encoder, *, head=None)",
    "modernbert.MultipleChoice.config": "property",
    "modernbert.MultipleChoice.forward": (
        "(self, batch=None, attention_mask=None, rows=None, labels=None, input_ids=None)"
    ),
    "modernbert.Packed": (
        "(input_ids, positions, cu_seqlens, lengths, max_seqlen, key_lengths=None, "
        "padded_rows=None, padded_length=None, recorded_rows=None)"
    ),
    "modernbert.Packed.num_tokens": "property",
    "modernbert.Packed.pin_memory": "(self)",
    "modernbert.Packed.rows_of": "(self, indices)",
    "modernbert.Packed.select": "(self, indices)",
    "modernbert.Packed.to": "(self, device, *, non_blocking=False)",
    "modernbert.QuestionAnswering": "(encoder, *, head=None)",
    "modernbert.QuestionAnswering.config": "property",
    "modernbert.QuestionAnswering.forward": (
        "(self, batch=None, attention_mask=None, rows=None, start_positions=None, end_positions=None, input_ids=None)"
    ),
    "modernbert.Ragged": "(values, offsets)",
    "modernbert.Ragged.from_list": "(matrices)",
    "modernbert.Ragged.pin_memory": "(self)",
    "modernbert.Ragged.to": "(self, device, *, non_blocking=False)",
    "modernbert.Reranker": "(classifier, tokenizer, config=None)",
    "modernbert.Reranker.forward": "(self, batch, *, rows=None)",
    "modernbert.Reranker.max_length": "property",
    "modernbert.Reranker.rank": (
        "(self, query, documents, *, top_k=None, batch_tokens=None, progress=None, devices=None)"
    ),
    "modernbert.Reranker.score": "(self, query, documents, *, batch_tokens=None, progress=None, devices=None)",
    "modernbert.Reranker.tokenize": "(self, documents, *, query, spans=False)",
    "modernbert.SequenceClassifier": "(encoder, *, labels=None, problem_type=None, head=None)",
    "modernbert.SequenceClassifier.config": "property",
    "modernbert.SequenceClassifier.forward": (
        "(self, batch=None, attention_mask=None, rows=None, labels=None, input_ids=None)"
    ),
    "modernbert.Session": "(model, *, engine=None)",
    "modernbert.Session.__call__": "(self, batch, *, rows=None)",
    "modernbert.Session.budget": "(self, total)",
    "modernbert.Session.save": "(self, path)",
    "modernbert.Session.stream_documents": "(self, texts, *, batch_tokens=None, pool_factor=1)",
    "modernbert.Session.encode_documents": "(self, texts, *, batch_tokens=None, progress=None, pool_factor=1)",
    "modernbert.Session.encode_queries": "(self, texts, *, batch_tokens=None, progress=None)",
    "modernbert.Session.encode_tokens": "(self, tokens, *, batch_tokens=None, advance=None)",
    "modernbert.TokenClassifier": "(encoder, *, labels=None, head=None)",
    "modernbert.TokenClassifier.config": "property",
    "modernbert.TokenClassifier.forward": (
        "(self, batch=None, attention_mask=None, rows=None, labels=None, input_ids=None, num_items_in_batch=None)"
    ),
    "modernbert.Tokenizer": "(backend, config=None)",
    "modernbert.Tokenizer.__call__": "(self, texts, *, max_length=None, is_split_into_words=False)",
    "modernbert.Tokenizer.add_tokens": "(self, tokens)",
    "modernbert.Tokenizer.added_tokens": "property",
    "modernbert.Tokenizer.decode": "(self, ids)",
    "modernbert.Tokenizer.encode_batch": (
        "(self, texts, *, max_length=None, offsets=True, warn=True, is_split_into_words=False)"
    ),
    "modernbert.Tokenizer.encode_beginnings": "(self, texts, *, max_length, offsets=True)",
    "modernbert.Tokenizer.encode_windows": "(self, texts, *, max_length=None, stride=0, is_split_into_words=False)",
    "modernbert.Tokenizer.files": "(self)",
    "modernbert.Tokenizer.from_pretrained": (
        "(folder_or_hub_id, *, revision=None, token=None, cache_dir=None, local_files_only=False, subfolder='')"
    ),
    "modernbert.Tokenizer.id_to_token": "(self, token_id)",
    "modernbert.Tokenizer.save_pretrained": "(self, folder)",
    "modernbert.Tokenizer.token_to_id": "(self, token)",
    "modernbert.Tokens": "(batch, keep, spans=(), truncated=())",
    "modernbert.Tokens.offsets": "property",
    "modernbert.Tokens.pin_memory": "(self)",
    "modernbert.Tokens.ragged": "(self, x_TE)",
    "modernbert.Tokens.rows": "property",
    "modernbert.Tokens.select": "(self, indices)",
    "modernbert.Tokens.to": "(self, device, *, non_blocking=False)",
    "modernbert.maxsim": "(queries, documents, *, paired=False, top_k=None)",
    "modernbert.pack": ("(sequences, attention_mask=None, *, query_mask=None, position_ids=None, vocab_size=None)"),
    "modernbert.unpack": "(values, batch)",
    "modernbert_kernels.Op": "(reference)",
    "modernbert_kernels.Op.__call__": "(self, *args, **kwargs)",
    "modernbert_kernels.Op.register": "(self, backend, *, when, check=None)",
    "modernbert_kernels.add_layer_norm": "(x_TD, delta_TD, weight_D, bias_D, eps, dtype=None)",
    "modernbert_kernels.attention": (
        "(qkv_T3HK, cu_seqlens, max_seqlen, *, rope, window=None, key_lengths=None, dropout_p=0.0, ranges_3T=None)"
    ),
    "modernbert_kernels.backend": "(name)",
    "modernbert_kernels.cpu": "module",
    "modernbert_kernels.embed_layer_norm": "(input_ids_T, table_VD, weight_D, bias_D, eps)",
    "modernbert_kernels.geglu": "(h_T2F, activation='gelu')",
    "modernbert_kernels.layer_norm": "(x_TD, weight_D, bias_D, eps)",
    "modernbert_kernels.linear": "(x_TD, weight_FD, bias_F=None)",
    "modernbert_kernels.linear_cross_entropy": (
        "(x_TD, weight_VD, bias_V, targets_T, *, z_loss=0.0, reduction='mean', label_smoothing=0.0)"
    ),
    "modernbert_kernels.maxsim": "(queries_QE, cu_queries, documents_NE, cu_documents, *, paired=False)",
    "modernbert_kernels.pool": "(x_TD, cu_seqlens, mode='cls', *, normalize=False)",
    "modernbert_kernels.project_normalize": "(x_TD, weight_ED, bias_E=None, rows_Q=None)",
    "modernbert_kernels.rotary": "(qkv_T3HK, cos_TR, sin_TR, *, inplace=False)",
    "modernbert_kernels.rotary_table": "(positions_T, theta, head_dim)",
    "modernbert_kernels.token_ranges": "(cu_seqlens, key_lengths, num_tokens)",
}


def arguments(function: Callable) -> str:
    """Names, kinds and defaults; annotations are the type checker's business."""
    signature = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def surface() -> dict[str, str]:
    """Every public name of the two packages, with its arguments."""
    rows = {}
    for package in (modernbert, modernbert_kernels):
        for name in package.__all__:
            value, label = getattr(package, name), f"{package.__name__}.{name}"
            if isinstance(value, modernbert_kernels.Op):
                rows[label] = arguments(value.reference)
            elif not inspect.isclass(value):
                rows[label] = arguments(value) if callable(value) else "module"
            else:
                rows[label] = arguments(value)
                own = [base for base in value.__mro__ if base.__module__.split(".")[0] == package.__name__]
                for member, raw in {name: raw for base in reversed(own) for name, raw in vars(base).items()}.items():
                    if isinstance(raw, property):
                        rows[f"{label}.{member}"] = "property"
                    elif inspect.isroutine(raw) and (member == "__call__" or not member.startswith("_")):
                        rows[f"{label}.{member}"] = arguments(getattr(value, member))
    return dict(sorted(rows.items()))


def test_nothing_public_changes_unseen():
    assert surface() == FROZEN


def test_names_are_listed_and_nothing_else_answers():
    assert set(modernbert.__all__) <= set(dir(modernbert))
    with pytest.raises(AttributeError, match="no attribute 'Encodre'; it has ColBERT, Embedder"):
        modernbert.Encodre  # noqa: B018
