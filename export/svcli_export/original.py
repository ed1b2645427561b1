"""How models that LLaVA's own code saved are spoken to. Their folders do not say it; that code chooses by their names.

Imports no torch.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer

IMAGE = "<image>"
_PARTS = (
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
_VICUNA = (
    "{% if messages[0].role != 'system' %}{{ \"A chat between a curious user and an artificial intelligence assistant."
    " The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER: ' }}{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    + _PARTS
    + "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAMA_3 = (
    "{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful and"
    " honest multimodal assistant.<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    + _PARTS
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The system turn is that of Skip-Vision's authors."""


def original_template(tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]] | None:
    """The template of Llama 3 or of Vicuna, by the tokens that there are, and what ends its answers, or None."""
    end = tokenizer.token_to_id("<|eot_id|>")
    if end is not None and tokenizer.token_to_id("<|start_header_id|>") is not None:
        return _LLAMA_3, (end,)
    end = tokenizer.token_to_id("</s>")
    return None if end is None else (_VICUNA, (end,))


def with_image_token(tokenizer_json: str) -> tuple[int, str]:
    """The id of `<image>`, and a tokenizer that has it.

    LLaVA's own code marks the place of a picture by a number that is no id. Here it has one, whose row nothing reads.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        tokenizer_json = tokenizer.to_str()
    number = tokenizer.token_to_id(IMAGE)
    assert number is not None
    return number, tokenizer_json
