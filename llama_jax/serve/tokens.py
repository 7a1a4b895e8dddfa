"""What lm-evaluation-harness and its kin ask of a server's tokenizer: /tokenize, /detokenize, /tokenizer_info."""

from typing import Any

from llama_jax.serve.bodies import DetokenizeBody, TokenizeBody
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.tokenizer.protocol import prompt_ids


async def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    """Ids of a text. Here alone the name of a special token is that token: clients ask for BOS in no other way."""
    service.check_model(body.model)
    served = service.served()

    def ids() -> list[int]:
        if body.add_special_tokens is False:
            return served.tokenizer.encode(body.prompt, special=True)
        return prompt_ids(served.tokenizer, body.prompt, special=True)

    found = await service.in_thread(ids, 'prompt')
    return {'tokens': found, 'count': len(found), 'max_model_len': served.context}


async def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    """Text of ids."""
    service.check_model(body.model)
    tokenizer = service.served().tokenizer
    if body.tokens and (largest := max(body.tokens)) >= tokenizer.vocab_size:
        raise bad(f'tokens holds {largest}; the tokenizer has {tokenizer.vocab_size}', 'tokens')
    return {'prompt': await service.in_thread(lambda: tokenizer.decode(body.tokens), 'tokens')}


def describe(service: Service) -> dict[str, Any]:
    """Names of the tokens that begin and end texts."""
    tokenizer, texts = service.served().tokenizer, service.served().texts
    return {
        'tokenizer_class': type(tokenizer).__name__,
        'vocab_size': tokenizer.vocab_size,
        'bos_token': texts.name_of(tokenizer.bos_id),
        'eos_token': texts.name_of(tokenizer.eos_id),
        'pad_token': None,
        'chat_template': None,
    }
