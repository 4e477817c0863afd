"""Small tokenizers made in the tests, for what no real tokenizer at hand shows."""

import tokenizers
from transformers import PreTrainedTokenizerFast


def byte_bpe(*, bos=None, pad=None, template=None, adds_bos=False, specials=()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with `</s>` as EOS, trained on one line: lossless on any text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>", *([bos] if bos else []), *([pad] if pad else []), *specials],
        show_progress=False,
    )
    backend.train_from_iterator(["Human: the the a an Assistant: hello there the an </ s> </ s>"], trainer)
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token=bos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def forging_bpe() -> PreTrainedTokenizerFast:
    """Return a BPE whose merges spell its own EOS, `</` + `s>`, and a byte piece."""
    pieces = ["</s>", "<unk>", "<", "/", "s", ">", "0", "x", "A", "</", "s>", "<0", "x0", "A>", "<0x0", "<0x0A>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "0"), ("x", "0"), ("A", ">"), ("<0", "x0"), ("<0x0", "A>")]
    model = tokenizers.models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram model whose best piece for the text `</s>` would be its own EOS."""
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((letter, -3.0) for letter in "</s>ab ")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
