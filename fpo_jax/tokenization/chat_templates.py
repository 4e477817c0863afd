"""Chat templates by name, as Jinja text; a recipe names one, a model path never chooses one.

They render what the models of the four alpha-PO recipes, ChatML models and Gemma-2 were trained on, turn by turn: no
text depends on a later turn. The word "system" in a template makes a prompt format with `auto_insert_empty_system` put
an empty system turn first (see `completion_texts.knows_system`): templates that fold a system text into a user turn
show nothing of an empty one.
"""

# header, blank line, trimmed content, <|eot_id|>; BOS once, at the start of the conversation
_LLAMA3 = (
    r"{% for turn in messages %}"
    r"{{ bos_token if loop.first else '' }}"
    r"{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + (turn.content | trim) + '<|eot_id|>' }}"
    r"{% endfor %}"
    r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"
)

# [INST] user [/INST] answer </s>; a system text opens the first user turn; no BOS, the tokenizer's own is prepended
_MISTRAL = (
    r"{% set ns = namespace(system='') %}"
    r"{% for turn in messages %}"
    r"{% if turn.role == 'system' and loop.first %}{% set ns.system = (turn.content | trim) + '\n\n' %}"
    r"{% elif turn.role == 'user' %}{{ '[INST] ' + ((ns.system + turn.content) | trim) + ' [/INST]' }}"
    r"{% set ns.system = '' %}"
    r"{% elif turn.role == 'assistant' %}{{ ' ' + (turn.content | trim) + ' ' + eos_token }}"
    r"{% else %}{{ raise_exception('a turn of role ' + turn.role + ' cannot stand here') }}"
    r"{% endif %}"
    r"{% endfor %}"
)

# <|role|>, newline, content as it is, </s>, newline
_ZEPHYR = (
    r"{% for turn in messages %}"
    r"{% if turn.role not in ['system', 'user', 'assistant'] %}"
    r"{{ raise_exception('Zephyr has no role ' + turn.role) }}"
    r"{% endif %}"
    r"{{ '<|' + turn.role + '|>\n' + turn.content + eos_token + '\n' }}"
    r"{% endfor %}"
    r"{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)

_CHATML = (
    r"{% for turn in messages %}"
    r"{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
    r"{% endfor %}"
    r"{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)

# the assistant is called model; a system text opens the first user turn; there is no third role
_GEMMA2 = (
    r"{{ bos_token }}"
    r"{% set ns = namespace(system='') %}"
    r"{% for turn in messages %}"
    r"{% if turn.role == 'system' and loop.first %}{% set ns.system = (turn.content | trim) + '\n\n' %}"
    r"{% elif turn.role in ['user', 'assistant'] %}"
    r"{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
    r"{{ ((ns.system + turn.content) | trim) + '<end_of_turn>\n' }}"
    r"{% set ns.system = '' %}"
    r"{% else %}{{ raise_exception('Gemma-2 has no role ' + turn.role + ' here') }}"
    r"{% endif %}"
    r"{% endfor %}"
    r"{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"
)

CHAT_TEMPLATES: dict[str, str] = {
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "zephyr": _ZEPHYR,
    "chatml": _CHATML,
    "gemma2": _GEMMA2,
}
