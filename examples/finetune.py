"""Fine-tune a ColBERT on pairs of a query and a passage, and save it.

python examples/finetune.py OUTPUT
"""

import sys

import torch

from modernbert import ColBERT, maxsim
from modernbert.train.losses import info_nce

pairs = [
    ("reset the router", "Hold the button on the back for ten seconds until the light blinks."),
    ("invoice is wrong", "Billing errors are corrected within two days; write to accounts."),
    ("parcel is late", "Track the shipment with the number in the confirmation mail."),
    ("change my password", "Open the profile page, choose security, and enter a new secret."),
]
queries, passages = zip(*pairs, strict=True)
model = ColBERT.default().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for step in range(5):
    query_vectors = model(model.tokenize_queries(queries, spans=False))
    passage_vectors = model(model.tokenize_documents(passages, spans=False))
    # The passage of another pair is a negative, unless both pairs have the same group.
    loss = info_nce(maxsim(query_vectors, passage_vectors) / 0.5, groups_B=torch.arange(len(pairs)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

model.eval().save_pretrained(sys.argv[1])
