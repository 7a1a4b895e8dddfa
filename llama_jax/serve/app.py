"""The web application: which path is answered by what, and what becomes of everything that goes wrong."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llama_jax.serve import chats, completions, responses, tokens
from llama_jax.serve.access import Access, read_body
from llama_jax.serve.answering import Chunks, joined, stream, unless_gone
from llama_jax.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, PassagesBody, TokenizeBody
from llama_jax.serve.documents import citations, with_passages
from llama_jax.serve.page import page
from llama_jax.serve.parameters import check_others
from llama_jax.serve.refusal import Refusal, of_validation
from llama_jax.serve.responses import ResponseBody
from llama_jax.serve.service import Service

_log = logging.getLogger(__name__)
_Body = TypeVar('_Body', bound=BaseModel)
_Asking = TypeVar('_Asking', ChatBody, CompletionBody, ResponseBody)
_Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The application around a service."""
    limits = service.limits

    async def read(request: Request, kind: type[_Body]) -> _Body:
        body = kind.model_validate_json(await read_body(request, limits.max_body))
        check_others(body)
        return body

    def answers(
        kind: type[_Asking],
        answer: Callable[[Service, _Asking, str], Awaitable[Chunks]],
        whole: Callable[[Chunks], Awaitable[dict[str, Any]]] = joined,
    ) -> _Handler:
        """Of a body that names the model, once that is there."""

        async def handle(request: Request) -> Response:
            service.served()
            body = await read(request, kind)
            service.check_model(body.model)
            chunks = await answer(service, body, request.state.key)
            if body.stream:
                return await stream(request, chunks)
            return JSONResponse(await unless_gone(request, whole(chunks)))

        return handle

    def tells(kind: type[_Body], tell: Callable[[Service, _Body], Awaitable[dict[str, Any]]]) -> _Handler:
        """Of a body that asks for no answer of the model."""

        async def handle(request: Request) -> Response:
            return JSONResponse(await tell(service, await read(request, kind)))

        return handle

    def shows(show: Callable[[Request], Any]) -> _Handler:
        """Of a path alone."""

        async def handle(request: Request) -> Response:
            shown = show(request)
            return shown if isinstance(shown, Response) else JSONResponse(shown)

        return handle

    def model(request: Request) -> dict[str, Any]:
        service.check_model(request.path_params.get('id'))
        return {'id': limits.name, 'object': 'model', 'created': service.created, 'owned_by': 'llama_jax'}

    def health(_: Request) -> dict[str, Any]:
        if not service.worker.is_alive:
            raise Refusal(503, 'the model does not come round', code='stalled')
        return {'status': 'alive'}

    def metrics(_: Request) -> Response:
        return Response(service.metrics.render(), media_type='text/plain; version=0.0.4; charset=utf-8')

    async def refused(request: Request, error: Any) -> Response:
        refusal, reason = error, None
        if isinstance(error, ValidationError):
            refusal, reason = of_validation(error), 'invalid'
        if request.method == 'POST':  # others ask for no answer
            service.metrics.refused.labels(reason or refusal.code or str(refusal.status)).inc()
        return refusal.response()

    routes = [
        Route('/v1/chat/completions', answers(ChatBody, chats.answer), methods=['POST']),
        Route('/v1/completions', answers(CompletionBody, completions.answer), methods=['POST']),
        Route('/v1/responses', answers(ResponseBody, responses.answer, responses.last), methods=['POST']),
        Route('/v1/models', shows(lambda request: {'object': 'list', 'data': [model(request)]})),
        Route('/v1/models/{id:path}', shows(model)),
        Route('/', shows(lambda _: page())),
        Route('/passages', tells(PassagesBody, _passages), methods=['POST']),
        Route('/tokenize', tells(TokenizeBody, tokens.tokenize), methods=['POST']),
        Route('/detokenize', tells(DetokenizeBody, tokens.detokenize), methods=['POST']),
        Route('/tokenizer_info', shows(lambda _: tokens.describe(service))),
        Route('/health', shows(health)),
        Route('/ready', shows(lambda _: {'status': 'ready'} if service.served() else None)),
        Route('/metrics', shows(metrics)),
    ]
    middleware = [Middleware(Access, hosts=limits.hosts, keys=limits.keys)]
    if limits.cors_origins:
        cors = {'allow_origins': list(limits.cors_origins), 'allow_methods': ['*'], 'allow_headers': ['*']}
        middleware.insert(0, Middleware(CORSMiddleware, **cors))  # pyright: ignore[reportArgumentType]
    handlers = {
        Refusal: refused, ValidationError: refused, HTTPException: _http, Exception: _defect, ClientDisconnect: _nobody,
    }  # fmt: skip
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # pyright: ignore


async def _passages(service: Service, body: PassagesBody) -> dict[str, Any]:
    if (documents := service.limits.documents) is None:
        raise Refusal(404, 'this server has no documents')
    found = await service.in_thread(lambda: documents.find(body.prompt), 'prompt')
    return {'prompt': with_passages(body.prompt, found), 'places': citations(found)}


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f'there is no {request.url.path}', 405: f'{request.url.path} does not take {request.method}'}
    response = Refusal(error.status_code, what.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    _log.error('%s failed', request.url.path, exc_info=error)
    return Refusal(500, 'the server failed at this request').response()
