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
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llama_jax.serve import chats, completions, responses, tokens
from llama_jax.serve.access import Access, read_body
from llama_jax.serve.answering import ClientGone
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

    async def read(request: Request, kind: type[_Body]) -> _Body:
        body = kind.model_validate_json(await read_body(request, service.limits.max_body))
        check_others(body)
        return body

    def answers(
        kind: type[_Asking], answer: Callable[[Service, _Asking, Request, str], Awaitable[Response]]
    ) -> _Handler:
        """Of a body that names the model, once that is there."""

        async def handle(request: Request) -> Response:
            service.served()
            body = await read(request, kind)
            service.check_model(body.model)
            return await answer(service, body, request, request.state.key)

        return _guarded(handle, service)

    def tells(kind: type[_Body], tell: Callable[[Service, _Body], Awaitable[dict[str, Any]]]) -> _Handler:
        """Of a body that asks for no answer of the model."""

        async def handle(request: Request) -> Response:
            return JSONResponse(await tell(service, await read(request, kind)))

        return _guarded(handle, service)

    async def front(request: Request) -> Response:
        del request
        return page()

    async def tokenizer_info(request: Request) -> Response:
        del request
        return JSONResponse(tokens.describe(service))

    def model() -> dict[str, Any]:
        return {
            'id': service.limits.name,
            'object': 'model',
            'created': service.created,
            'owned_by': 'llama_jax',
        }

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({'object': 'list', 'data': [model()]})

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params['id'])
        return JSONResponse(model())

    async def health(request: Request) -> Response:
        del request
        if service.worker.is_alive:
            return JSONResponse({'status': 'alive'})
        raise Refusal(503, 'the model does not come round', code='stalled')

    async def ready(request: Request) -> Response:
        del request
        service.served()
        return JSONResponse({'status': 'ready'})

    async def metrics(request: Request) -> Response:
        del request
        return PlainTextResponse(
            service.metrics.render(), media_type='text/plain; version=0.0.4; charset=utf-8'
        )

    routes = [
        Route('/v1/chat/completions', answers(ChatBody, chats.chat), methods=['POST']),
        Route('/v1/completions', answers(CompletionBody, completions.complete), methods=['POST']),
        Route('/v1/responses', answers(ResponseBody, responses.respond), methods=['POST']),
        Route('/v1/models', models),
        Route('/v1/models/{id:path}', one_model),
        Route('/', front),
        Route('/passages', tells(PassagesBody, _passages), methods=['POST']),
        Route('/tokenize', tells(TokenizeBody, tokens.tokenize), methods=['POST']),
        Route('/detokenize', tells(DetokenizeBody, tokens.detokenize), methods=['POST']),
        Route('/tokenizer_info', tokenizer_info),
        Route('/health', health),
        Route('/ready', ready),
        Route('/metrics', metrics),
    ]
    limits = service.limits
    middleware = [Middleware(Access, service=service)]
    if limits.cors_origins:
        cors = {'allow_origins': list(limits.cors_origins), 'allow_methods': ['*'], 'allow_headers': ['*']}
        middleware.insert(0, Middleware(CORSMiddleware, **cors))  # pyright: ignore[reportArgumentType]
    handlers = {Refusal: _refusal, HTTPException: _http, Exception: _defect}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # pyright: ignore


async def _passages(service: Service, body: PassagesBody) -> dict[str, Any]:
    if (documents := service.limits.documents) is None:
        raise Refusal(404, 'this server has no documents')
    found = await service.in_thread(lambda: documents.find(body.prompt), 'prompt')
    return {'prompt': with_passages(body.prompt, found), 'places': citations(found)}


def _guarded(handler: _Handler, service: Service) -> _Handler:
    """A handler whose refusals are counted, and which nobody may wait for."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ValidationError as error:
            service.metrics.refused.labels('invalid').inc()
            raise of_validation(error) from None
        except Refusal as refusal:
            service.metrics.refused.labels(refusal.code or str(refusal.status)).inc()
            raise
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it

    return guarded


async def _refusal(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refusal)
    return error.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f'there is no {request.url.path}', 405: f'{request.url.path} does not take {request.method}'}
    response = Refusal(error.status_code, what.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    _log.error('%s failed', request.url.path, exc_info=error)
    return Refusal(500, 'the server failed at this request').response()
