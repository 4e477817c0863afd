# ruff: noqa: E501  (literal rows)
"""The original's rendering: every named template with every real tokenizer, token for token, and where rows end."""

import pytest

from fpo_jax import tokenization
from tests import real_tokenizers, toy_tokenizers

# tokenizer and template; the prompt; the completion, which begins with the assistant's header and is scored whole.
# Where a template's marks are no tokens of the vocabulary they are text, and may merge across the boundary: `|><`.
ROWS = """
neox llama3
< | start _ header _ id |> user < | end _ header _ id |> Ċ Ċ Hi < | e ot _ id
| >< | start _ header _ id |> ass istant < | end _ header _ id |> Ċ Ċ Yes < | e ot _ id |> <|endoftext|>

neox mistral
[ INST ] ĠHi Ġ[ / INST ]
ĠYes Ġ <|endoftext|>

neox zephyr
< | system |> Ċ <|endoftext|> Ċ < | user |> Ċ Hi <|endoftext|> Ċ
< | ass istant |> Ċ Yes <|endoftext|> Ċ <|endoftext|>

neox chatml
< | im _ start |> system Ċ < | im _ end |> Ċ < | im _ start |> user Ċ Hi < | im _ end |> Ċ
< | im _ start |> ass istant Ċ Yes < | im _ end |> Ċ <|endoftext|>

neox gemma2
< start _ of _ turn > user Ċ Hi < end _ of _ turn > Ċ
< start _ of _ turn > model Ċ Yes < end _ of _ turn > Ċ <|endoftext|>

phi3 llama3
<s> < | start _ header _ id | > user < | end _ header _ id | > <0x0A> <0x0A> Hi < | e ot _ id |
>< | start _ header _ id | > ass istant < | end _ header _ id | > <0x0A> <0x0A> Yes < | e ot _ id | > <|endoftext|>

phi3 mistral
▁[ INST ] ▁Hi ▁[ / INST ]
▁Yes ▁ <|endoftext|>

phi3 zephyr
<|system|> <|endoftext|> <0x0A> <|user|> Hi <|endoftext|> <0x0A>
<|assistant|> Yes <|endoftext|> <0x0A> <|endoftext|>

phi3 chatml
▁< | im _ start | > system <0x0A> < | im _ end | > <0x0A> < | im _ start | > user <0x0A> Hi < | im _ end | > <0x0A>
< | im _ start | > ass istant <0x0A> Yes < | im _ end | > <0x0A> <|endoftext|>

phi3 gemma2
<s> < start _ of _ turn > user <0x0A> Hi < end _ of _ turn > <0x0A>
< start _ of _ turn > model <0x0A> Yes < end _ of _ turn > <0x0A> <|endoftext|>

mistral1 llama3
<s> < | start _ header _ id | > user < | end _ header _ id | > <0x0A> <0x0A> Hi < | e ot _ id |
>< | start _ header _ id | > ass istant < | end _ header _ id | > <0x0A> <0x0A> Yes < | e ot _ id | > </s>

mistral1 mistral
<s> ▁[ INST ] ▁Hi ▁[ / INST ]
▁Yes ▁ </s>

mistral1 zephyr
<s> ▁< | system | > <0x0A> </s> <0x0A> < | user | > <0x0A> Hi </s> <0x0A>
< | ass istant | > <0x0A> Yes </s> <0x0A> </s>

mistral1 chatml
<s> ▁< | im _ start | > system <0x0A> < | im _ end | > <0x0A> < | im _ start | > user <0x0A> Hi < | im _ end | > <0x0A>
< | im _ start | > ass istant <0x0A> Yes < | im _ end | > <0x0A> </s>

mistral1 gemma2
<s> < start _ of _ turn > user <0x0A> Hi < end _ of _ turn > <0x0A>
< start _ of _ turn > model <0x0A> Yes < end _ of _ turn > <0x0A> </s>

mistral3 llama3
<s> < | start _ header _ id | > user < | end _ header _ id | > <0x0A> <0x0A> Hi < | e ot _ id |
>< | start _ header _ id | > ass istant < | end _ header _ id | > <0x0A> <0x0A> Yes < | e ot _ id | > </s>

mistral3 mistral
<s> [INST] ▁Hi ▁ [/INST]
▁Yes ▁ </s>

mistral3 zephyr
<s> ▁< | system | > <0x0A> </s> <0x0A> < | user | > <0x0A> Hi </s> <0x0A>
< | ass istant | > <0x0A> Yes </s> <0x0A> </s>

mistral3 chatml
<s> ▁< | im _ start | > system <0x0A> < | im _ end | > <0x0A> < | im _ start | > user <0x0A> Hi < | im _ end | > <0x0A>
< | im _ start | > ass istant <0x0A> Yes < | im _ end | > <0x0A> </s>

mistral3 gemma2
<s> < start _ of _ turn > user <0x0A> Hi < end _ of _ turn > <0x0A>
< start _ of _ turn > model <0x0A> Yes < end _ of _ turn > <0x0A> </s>

stories llama3
<s> ▁ < | st ar t <0x5F> he ad er <0x5F> id | > u s er < | end <0x5F> he ad er <0x5F> id | > <0x0A> <0x0A> H i < | e ot <0x5F> id | >
< | st ar t <0x5F> he ad er <0x5F> id | > a s s is t an t < | end <0x5F> he ad er <0x5F> id | > <0x0A> <0x0A> Y es < | e ot <0x5F> id | > </s>

stories mistral
<s> ▁ [ I N S T ] ▁H i ▁ [ / I N S T ]
▁ Y es ▁ </s>

stories zephyr
<s> ▁ < | s y st e m | > <0x0A> </s> ▁ <0x0A> < | u s er | > <0x0A> H i </s> ▁ <0x0A>
< | a s s is t an t | > <0x0A> Y es </s> ▁ <0x0A> </s>

stories chatml
<s> ▁ < | im <0x5F> st ar t | > s y st e m <0x0A> < | im <0x5F> end | > <0x0A> < | im <0x5F> st ar t | > u s er <0x0A> H i < | im <0x5F> end | > <0x0A>
< | im <0x5F> st ar t | > a s s is t an t <0x0A> Y es < | im <0x5F> end | > <0x0A> </s>

stories gemma2
<s> ▁ < st ar t <0x5F> o f <0x5F> t u r n > u s er <0x0A> H i < end <0x5F> o f <0x5F> t u r n > <0x0A>
< st ar t <0x5F> o f <0x5F> t u r n > m o d e l <0x0A> Y es < end <0x5F> o f <0x5F> t u r n > <0x0A> </s>
"""
BLOCKS = [block.split("\n") for block in ROWS.strip().split("\n\n")]
TURN = [{"role": "user", "content": "Hi"}]


def tokens_of(encoder):
    """Tokens of the prompt and of the completion."""
    [[row]] = tokenization.chat_rows(encoder, [TURN], [["Yes"]], max_length=200, max_prompt_length=100)
    tokens = encoder.tokenizer.convert_ids_to_tokens(row.ids)
    return " ".join(tokens[: row.prompt_length]), " ".join(tokens[row.prompt_length :])


def test_every_pair_is_drawn():
    pairs = [
        f"{tokenizer} {template}" for tokenizer in real_tokenizers.NAMES for template in tokenization.CHAT_TEMPLATES
    ]
    assert [title for title, _, _ in BLOCKS] == pairs


@pytest.mark.parametrize("title, prompt, completion", BLOCKS, ids=[title for title, _, _ in BLOCKS])
def test_tokens_of_a_conversation(title, prompt, completion):
    encoder = real_tokenizers.encoder(*title.split(), real_tokenizers.ORIGINAL)
    assert tokens_of(encoder) == (prompt, completion)
    bos = encoder.tokenizer.bos_token
    # phi-3 names a BOS and does not open texts with it: there the template alone can write it
    opens = bos is not None and (encoder.adds_bos or "bos_token" in encoder.tokenizer.chat_template)
    assert prompt.split().count(bos) == opens and bos not in completion.split()
    assert completion.split()[-1] == encoder.tokenizer.eos_token


LLAMA3 = dict(
    bos="<|begin_of_text|>", specials=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
)
GEMMA2 = dict(bos="<bos>", specials=["<start_of_turn>", "<end_of_turn>", "<eos>"])
QWEN = dict(specials=["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
HEADER = "<|start_header_id|> <|end_header_id|> Ċ Ċ <|eot_id|>"


@pytest.mark.parametrize(
    "vocabulary, template, eos, prompt, completion",
    [
        # Llama-3 as first published ends a text with another token than a turn, and it is added; later they are one
        (LLAMA3, "llama3", "<|end_of_text|>", f"<|begin_of_text|> {HEADER}", f"{HEADER} <|end_of_text|>"),
        (LLAMA3, "llama3", "<|eot_id|>", f"<|begin_of_text|> {HEADER}", HEADER),
        (GEMMA2, "gemma2", "<eos>", "<bos> <start_of_turn> Ċ <end_of_turn> Ċ", "<start_of_turn> Ċ <end_of_turn> Ċ <eos>"),
        (QWEN, "chatml", "<|im_end|>", "<|im_start|> Ċ <|im_end|> Ċ <|im_start|> Ċ <|im_end|> Ċ",
         "<|im_start|> Ċ <|im_end|> Ċ <|im_end|>"),
    ],
    ids=["llama3 old", "llama3 new", "gemma2", "qwen"],
)  # fmt: skip
@pytest.mark.parametrize("adds_bos", [False, True])
def test_marks_that_are_tokens(vocabulary, template, eos, prompt, completion, adds_bos):
    """One BOS, from the template or the tokenizer; EOS unless the row ends with it, where a newline after it counts."""
    if adds_bos and "bos" not in vocabulary:
        pytest.skip("Qwen has no BOS token")
    tokenizer = toy_tokenizers.byte_bpe(template=tokenization.CHAT_TEMPLATES[template], adds_bos=adds_bos, **vocabulary)
    tokenizer.eos_token = eos
    marks = {*vocabulary["specials"], vocabulary.get("bos"), "Ċ"}
    got = [
        " ".join(t for t in part.split() if t in marks)
        for part in tokens_of(tokenization.encoder(tokenizer, real_tokenizers.ORIGINAL))
    ]
    assert got == [prompt, completion]
