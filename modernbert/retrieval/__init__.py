"""Documents in, ranked passages out, with reasons: `index` makes a store on disk, and `Store` searches it."""

from .build import forget, index
from .store.search import Hit, Store

__all__ = ["Hit", "Store", "forget", "index"]
