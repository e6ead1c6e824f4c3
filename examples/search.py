"""Index files and folders, and print the three passages that answer a question best.

python examples/search.py "how do I add a kernel?" README.md kernels
"""

import sys
import tempfile

from modernbert.retrieval import Store, index

question, *paths = sys.argv[1:]

with tempfile.TemporaryDirectory() as folder:  # a folder of your own is brought up to date by the next call
    index(paths, folder)
    with Store(folder) as store:
        for hit in store.search([question], top_k=3)[0]:
            print(f"{hit.score:.2f}  {hit.passage.path}:{hit.passage.line}  {hit.passage.title}")
            print(f"      {' '.join(hit.passage.text.split())[:90]}")
