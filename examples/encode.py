"""Encode texts to one vector per token, and score every query with every document."""

from modernbert import ColBERT, maxsim

queries = ["where does a cell get its energy?", "how did the war end?"]
documents = [
    "The mitochondrion produces most of the energy that a cell needs.",
    "A glacier is a body of dense ice that moves under its own weight.",
    "The treaty of 1648 ended the Thirty Years' War.",
]

model = ColBERT.default()  # or ColBERT.from_pretrained(folder or hub id)
query_vectors = model.encode_queries(queries)
document_vectors = model.encode_documents(documents)
print(f"{len(document_vectors.values)} document tokens of width {model.dim}")

scores_BN = maxsim(query_vectors, document_vectors)
for query, scores_N in zip(queries, scores_BN, strict=True):
    best = int(scores_N.argmax())
    print(f"{query}\n  {scores_N[best]:.2f}  {documents[best]}")
