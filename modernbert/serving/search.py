"""Search in a store: questions are encoded in the batches of its model, and scored one after another in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from ..packing import Tokens
from ..retrieval.explain import TokenMatch
from ..retrieval.page import explain_page
from ..retrieval.queries import EncodedQuery
from ..retrieval.rows import hit_rows
from ..retrieval.spelling import tokenize
from ..retrieval.store.search import Hit, Store
from ..texts import check_unicode
from .models import Served
from .refused import Refused
from .schemas import SearchRequest

T = TypeVar("T")


class Answer(NamedTuple):
    """A question, its hits, and the matches of each, if they were asked for."""

    query: EncodedQuery
    hits: list[Hit]
    matches: list[list[TokenMatch]]


class Searcher:
    """Answers from a store.

    Args:
        store: is closed with the searcher. served: its model.
    """

    def __init__(self, store: Store, served: Served) -> None:
        self.store, self.served = store, served
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def rows(self, request: SearchRequest) -> dict[str, object]:
        """The hits with their reasons. What the model does not read of a question is among the `warnings`."""
        tokens = await self._run(self._tokens, request.query)
        answer = await self._answer(request, tokens)
        rows = await self._run(hit_rows, answer.query.text, answer.hits, answer.matches)
        cut = sum(tokens.truncated)
        read = tokens.batch.lengths[0]
        warned = [f"the query has at least {read + cut:,} tokens, of which the model reads {read:,}"] if cut else []
        return {"query": request.query, "hits": rows, "warnings": warned}

    async def page(self, question: str) -> str:
        """The page that explains the best hits, with a form for the next question; for "" only the form."""
        if not question.strip():
            return explain_page("", [], ask=True)
        tokens = await self._run(self._tokens, question)
        found = await self._answer(SearchRequest(query=question), tokens)
        explained = list(zip(found.hits, found.matches, strict=True))
        return await self._run(lambda: explain_page(question, explained, ask=True))

    def close(self) -> None:
        """Wait for the search that runs, and close the store."""
        self._thread.shutdown(cancel_futures=True)
        self.store.close()

    def _tokens(self, question: str) -> Tokens:
        if not question.strip():
            raise Refused(400, "query is empty: ask for something", "query")
        try:
            check_unicode(0, question)
        except ValueError as error:
            raise Refused(400, f"query: {error}", "query") from error
        return tokenize(self.store.colbert.tokenize_queries, [question])

    async def _answer(self, request: SearchRequest, tokens: Tokens) -> Answer:
        vectors = await self.served.encode(tokens)
        return await self._run(self._search, request, EncodedQuery(request.query, vectors[0], tokens.spans[0]))

    def _search(self, request: SearchRequest, query: EncodedQuery) -> Answer:
        options = request.model_dump(include={"top_k", "by", "path", "where", "prefilter"})
        try:
            (hits,) = self.store.search([query], **options)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        return Answer(query, hits, [self.store.explain(query, hit) for hit in hits] if request.reasons else [])

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
