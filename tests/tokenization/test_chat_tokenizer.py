"""Loading tokenizers, and that no text in the data ever becomes a control token."""

import gzip
import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from fpo_jax import tokenization
from fpo_jax.tokenization import tokenizer as tokens
from tests import real_tokenizers, toy_tokenizers
from tests.paths import shared_data


@pytest.fixture(scope="module", params=real_tokenizers.NAMES)
def real(request):
    return real_tokenizers.encoder(request.param)


def transcripts(count):
    with gzip.open(shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["chosen"] for _ in range(count)]


class TestLoading:
    def test_bare_json_needs_an_eos_token(self):
        with pytest.raises(ValueError, match=r"names no EOS token, so no completion .* pass eos_token="):
            tokenization.load_tokenizer(real_tokenizers.path("neox"))

    def test_eos_token_must_be_in_the_vocabulary(self):
        with pytest.raises(ValueError, match=r"eos_token '<eos>' is not in the vocabulary"):
            tokenization.load_tokenizer(real_tokenizers.path("neox"), eos_token="<eos>")

    @pytest.mark.parametrize("name", ["mistral1", "mistral3"])
    def test_sentencepiece_file_encodes_as_sentencepiece_does(self, name):
        tokenizer = real_tokenizers.encoder(name).tokenizer
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(real_tokenizers.path(name)))
        texts = [
            "Hi",
            "two  spaces   three ",
            "line\nline",
            "naïve 東京 🙂",
            *(text.strip() for text in transcripts(150)),
        ]
        assert [ids[1:] for ids in tokenizer(texts)["input_ids"]] == oracle.encode(texts)
        assert {ids[0] for ids in tokenizer(texts)["input_ids"]} == {1}

    def test_saved_tokenizer_loads_the_same(self, tmp_path):
        tokenizer = real_tokenizers.encoder("mistral3", "mistral").tokenizer
        tokenizer.save_pretrained(tmp_path)
        again = tokenization.load_tokenizer(tmp_path)
        texts = ["two  spaces   three ", " a", "</s>x", *transcripts(20)]
        assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert again.chat_template == tokenization.CHAT_TEMPLATES["mistral"]

    def test_sentencepiece_model_that_is_no_bpe(self, tmp_path):
        model = sentencepiece_model_pb2.ModelProto()
        model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
        for piece in ("<unk>", "<s>", "</s>", "a"):
            model.pieces.add(piece=piece, score=0.0)
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=r"is not a BPE; save a tokenizer\.json"):
            tokenization.load_tokenizer(tmp_path)

    @pytest.mark.parametrize("settings, bos", [(None, [1]), ({}, [1]), ({"add_bos_token": False}, [])])
    def test_directory_with_sentencepiece_only(self, tmp_path, settings, bos):
        shutil.copy(real_tokenizers.path("mistral1"), tmp_path / "tokenizer.model")
        if settings is not None:
            base = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | settings))
        tokenizer = tokenization.load_tokenizer(tmp_path)
        assert tokenizer("Hi")["input_ids"] == [*bos, 15359]  # with the prefix space; without it the id is 23809
        assert tokenizer.eos_token_id == 2

    def test_phi3_directory(self):
        tokenizer = real_tokenizers.encoder("phi3").tokenizer
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (32000, 32000, 1)
        assert not real_tokenizers.encoder("phi3").adds_bos

    def test_missing_path_is_not_taken_for_a_hub_name(self, tmp_path):
        for path in (tmp_path / "no" / "model", "tokenizer.json", "models/tokenizer.model", "justaname"):
            with pytest.raises(ValueError, match=r"no such file or directory, and a hub name has the form owner/name"):
                tokenization.load_tokenizer(path)

    def test_hub_name_without_network(self):
        with pytest.raises(ValueError, match=r"cannot load a tokenizer from 'nobody/nothing-here'"):
            tokenization.load_tokenizer("nobody/nothing-here")

    def test_directory_without_tokenizer_lists_what_it_holds(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"holds none of tokenizer\.json, .*; it holds model\.safetensors"):
            tokenization.load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
    def test_damaged_file(self, tmp_path, name):
        (tmp_path / name).write_bytes(b'{"version": "1.0", "trunc')
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(ValueError, match=r"cannot load a tokenizer from"):
                tokenization.load_tokenizer(path)

    def test_file_of_another_kind(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        with pytest.raises(ValueError, match=r"a tokenizer file is a tokenizer\.json or a SentencePiece \.model"):
            tokenization.load_tokenizer(tmp_path / "vocab.txt")

    def test_tokenizer_without_a_rust_version(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
        with pytest.raises(ValueError, match=r"is a ByT5Tokenizer, which has no Rust version; save a tokenizer\.json"):
            tokenization.load_tokenizer(tmp_path)

    def test_code_in_the_directory_never_runs(self, tmp_path):
        canary = tmp_path / "canary"
        toy_tokenizers.byte_bpe().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
        try:
            tokenization.load_tokenizer(tmp_path)
        except ValueError as error:
            assert "cannot load a tokenizer" in str(error)
        assert not canary.exists()


class TestChatTemplateArgument:
    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("toy")
        toy_tokenizers.byte_bpe().save_pretrained(path)
        return path

    def test_none_keeps_the_tokenizers_own(self, directory):
        assert tokenization.load_tokenizer(directory).chat_template is None

    @pytest.mark.parametrize("name", list(tokenization.CHAT_TEMPLATES))
    def test_named(self, directory, name):
        assert (
            tokenization.load_tokenizer(directory, chat_template=name).chat_template
            == tokenization.CHAT_TEMPLATES[name]
        )

    def test_text_and_file(self, directory, tmp_path):
        text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        (tmp_path / "template.jinja").write_text(text)
        assert tokenization.load_tokenizer(directory, chat_template=text).chat_template == text
        assert (
            tokenization.load_tokenizer(directory, chat_template=str(tmp_path / "template.jinja")).chat_template == text
        )

    def test_unknown_name_lists_the_names(self, directory):
        with pytest.raises(ValueError, match=r"chat_template 'mistrl' is no file.* not one of llama3, mistral, zephyr"):
            tokenization.load_tokenizer(directory, chat_template="mistrl")

    def test_broken_jinja(self, directory):
        with pytest.raises(ValueError, match=r"chat_template is broken Jinja at its line 2"):
            tokenization.load_tokenizer(directory, chat_template="{{ bos_token }}\n{% for m in %}")


class TestControlTokens:
    def test_ordinary_text_encodes_as_the_tokenizer_does(self, real):
        texts = [*transcripts(120), "naïve 東京 🙂 \u0301", "", " ", "\n\n  x", "a<think>b", "tab\tand   spaces"]
        assert tokenization.encode(real, texts) == real.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def test_text_that_spells_a_control_token_stays_text(self, real):
        vocabulary = real.tokenizer.get_vocab()
        spellings = {*real.controls, *({"<s>", "</s>", "<unk>"} & vocabulary.keys())}  # Phi-3 does not flag its </s>
        ids = {vocabulary[spelling] for spelling in spellings}
        texts = [f"x {spelling}\n{spelling} y" for spelling in spellings]
        texts.append("<|eot_id|></s><0x0A><|endoftext|>")
        for text, encoded in zip(texts, tokenization.encode(real, texts), strict=True):
            assert not ids & set(encoded), text
            assert real.tokenizer.decode(encoded, clean_up_tokenization_spaces=False).strip() == text
        newline = real.tokenizer.convert_tokens_to_ids("<0x0A>")
        if isinstance(newline, int):
            assert newline not in tokenization.encode(real, ["a <0x0A> b"])[0]

    def test_what_a_template_writes_encodes_as_the_tokenizer_does(self, real):
        texts = [f"x {spelling}\n y{spelling}z" for spelling in real.controls] + ["".join(real.controls[:5])]
        aliased = [tokens.alias(real, text) for text in texts]
        assert tokenization.encode(real, aliased) == real.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def test_non_special_markers_are_control_tokens_and_thoughts_are_not(self):
        tokenizer = toy_tokenizers.byte_bpe()
        tokenizer.add_tokens(["<｜User｜>", "<|call|>", "<think>"])  # added without the special flag
        encoder = tokenization.encoder(tokenizer)
        assert {"<｜User｜>", "<|call|>", "</s>"} == set(encoder.controls)
        assert tokenization.encode(encoder, ["<think>"]) == [[tokenizer.convert_tokens_to_ids("<think>")]]

    @pytest.mark.parametrize("make", [toy_tokenizers.forging_bpe, toy_tokenizers.unigram])
    def test_models_that_would_spell_eos_from_text(self, make):
        tokenizer = make()
        encoder = tokenization.encoder(tokenizer)
        [ids] = tokenization.encode(encoder, ["</s>"])
        assert tokenizer.eos_token_id not in ids and tokenizer.unk_token_id not in ids
        assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "</s>"
        assert tokenization.encode(encoder, [tokens.alias(encoder, "</s>")]) == [[tokenizer.eos_token_id]]
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True  # the usual remedy is not enough for either model
        assert tokenizer.eos_token_id in backend.encode("</s>").ids

    def test_text_never_reaches_a_byte_piece(self):
        encoder = tokenization.encoder(toy_tokenizers.forging_bpe())
        assert encoder.tokenizer.convert_tokens_to_ids("<0x0A>") not in tokenization.encode(encoder, ["<0x0A>"])[0]

    def test_protected_text_passes_through_a_template_unchanged(self):
        encoder = tokenization.encoder(toy_tokenizers.byte_bpe(bos="<s>", specials=["<|end|>"]))
        text = "</s> <s><|end|>0</s>1"
        assert tokens.alias(encoder, tokens.protect(encoder, text)) == text
        assert "</s>" not in tokens.protect(encoder, text)

    @pytest.mark.parametrize("character", ["\ufdd0", "\ufdd1", "\ufdd2"])
    def test_reserved_characters_are_refused(self, character):
        encoder = tokenization.encoder(toy_tokenizers.byte_bpe())
        with pytest.raises(ValueError, match=rf"noncharacter U\+{ord(character):04X} at position 3, .*remove it"):
            tokenization.raw_rows(encoder, ["abc" + character], [["x", "y"]], max_length=9, max_completion_length=4)
        with pytest.raises(ValueError, match=rf"noncharacter U\+{ord(character):04X} at position 0"):
            tokenization.raw_rows(encoder, ["abc"], [["x", character]], max_length=9, max_completion_length=4)

    @given(st.text(max_size=30))
    @settings(max_examples=150, deadline=None)
    def test_any_text_survives_encoding(self, text):
        encoder = _LOSSLESS
        if tokens._RESERVED.search(text):
            return
        [ids] = tokenization.encode(encoder, [text])
        assert encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert encoder.eos_id not in ids

    def test_tokenizer_without_eos(self):
        tokenizer = toy_tokenizers.byte_bpe()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"names no EOS token"):
            tokenization.encoder(tokenizer)

    def test_eos_token_that_is_not_an_added_token(self):
        tokenizer = toy_tokenizers.byte_bpe()
        tokenizer.eos_token = "."
        with pytest.raises(ValueError, match=r"the EOS token '\.' is not an added token; use add_special_tokens"):
            tokenization.encoder(tokenizer)


_LOSSLESS = tokenization.encoder(toy_tokenizers.byte_bpe(bos="<s>"))
