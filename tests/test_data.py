import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.normalizers import NFKC, Replace
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

from prune_callbacks import TokenDataModule
from prune_callbacks.calibration.windows import contiguous_windows, joined_windows, random_windows
from prune_callbacks.tasks import HubText, PythonDocs, TextFile, byte_tokenizer
from prune_callbacks.tasks.loader import ResumableLoader, Shuffled, Windows


def encode(text):
    return [ord(c) for c in text]


def test_random_windows_are_pieces_of_documents_and_do_not_overlap():
    documents = ["".join(chr(1000 * d + i) for i in range(n)) for d, n in enumerate([50, 9, 33, 20], 1)]
    windows = random_windows(documents, encode, 6, 10, seed=1)
    assert windows.shape == (6, 10)
    tokens = windows.flatten().tolist()
    assert len(set(tokens)) == len(tokens)
    for window in windows.tolist():
        assert window == list(range(window[0], window[0] + 10))
    assert torch.equal(windows, random_windows(documents, encode, 6, 10, seed=1))
    assert not torch.equal(windows, random_windows(documents, encode, 6, 10, seed=2))


def test_long_documents_each_give_one_window_first():
    documents = ["".join(chr(1000 * d + i) for i in range(100)) for d in range(1, 6)]
    windows = random_windows(documents, encode, 5, 10)
    assert sorted(int(w[0]) // 1000 for w in windows) == [1, 2, 3, 4, 5]


def test_too_few_windows_say_what_there_is():
    with pytest.raises(
        ValueError, match=r"asked for 4 calibration windows of 10 tokens; the corpus \(2 documents, the "
    ):
        random_windows(["x" * 25, "y" * 9], encode, 4, 10)
    with pytest.raises(ValueError, match=r"has 25 tokens and fills 2 windows of 10; 3 are needed"):
        contiguous_windows(["x" * 25], encode, 10, limit=3)
    with pytest.raises(ValueError, match=r"fills 0 windows of 10; 1 are needed"):
        contiguous_windows(["x"], encode, 10)


def test_documents_are_tokenized_until_there_are_enough_windows():
    seen = []
    random_windows([letter * 30 for letter in "abcdef"], lambda text: seen.append(text) or encode(text), 2, 10)
    assert len(seen) == 2


def rows(count, size):
    """Rows of which every character occurs once in all."""
    return ["".join(chr(0x4E00 + size * row + place) for place in range(size)) for row in range(count)]


def test_joined_windows_are_rows_in_a_random_order_with_blank_lines_between():
    documents = rows(20, 12)
    windows = joined_windows(documents, encode, 5, 50, seed=3)
    assert windows.shape == (5, 50)
    text = "".join(map(chr, windows.flatten().tolist()))
    parts = text.split("\n\n")
    assert all(part in documents for part in parts[:-1])
    assert any(document.startswith(parts[-1]) for document in documents)
    assert len(set(parts)) == len(parts)
    assert parts[:-1] != documents[: len(parts) - 1]
    assert torch.equal(windows, joined_windows(documents, encode, 5, 50, seed=3))
    assert not torch.equal(windows, joined_windows(documents, encode, 5, 50, seed=4))
    with pytest.raises(ValueError, match=r"the text has 278 tokens and fills 5 windows of 50; 6 are needed"):
        joined_windows(documents, encode, 6, 50)


def test_the_advice_to_join_rows_says_what_that_gives():
    with pytest.raises(ValueError, match=r"holds 0\. .*or join the rows: with join_rows=True they fill about 5"):
        random_windows(rows(20, 12), encode, 4, 50)
    with pytest.raises(ValueError, match=r"longest of 95 tokens\) holds 3\. .* with join_rows=True they fill about 11"):
        random_windows(rows(20, 12) + ["x" * 95] * 3, encode, 8, 50)
    with pytest.raises(ValueError, match=r"holds 1\. Ask for fewer or shorter windows, or give more text$"):
        random_windows(["x" * 95], encode, 2, 50)


def test_contiguous_windows_join_documents_with_blank_lines():
    windows = contiguous_windows(["abc", "defgh"], encode, 5)
    assert ["".join(map(chr, w)) for w in windows.tolist()] == ["abc\n\n", "defgh"]


def trained_tokenizer(kind):
    """Tokenizers as models have them: within words (GPT-2, Llama 3), over whole texts (Llama 2), by likelihood (T5)."""
    text = PythonDocs("calibration").documents()
    if kind == "byte-level BPE":
        tokenizer, trainer = Tokenizer(BPE()), BpeTrainer(vocab_size=600, show_progress=False)
        tokenizer.pre_tokenizer = ByteLevel()
    elif kind == "BPE over whole texts":
        tokenizer, trainer = Tokenizer(BPE()), BpeTrainer(vocab_size=600, show_progress=False)
        tokenizer.normalizer = Replace(" ", "\u2581")
        text = [line for document in text for line in document.splitlines()]
    else:
        tokenizer, trainer = (
            Tokenizer(Unigram()),
            UnigramTrainer(vocab_size=600, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]),
        )
        tokenizer.normalizer, tokenizer.pre_tokenizer = NFKC(), Metaspace()
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE over whole texts", "Unigram"])
@pytest.mark.parametrize("joined", ["\n\n", " "], ids=["lines", "one line"])
def test_the_first_windows_are_those_of_the_whole_text_though_the_rest_is_not_tokenized(kind, joined):
    tokenizer, characters = trained_tokenizer(kind), []
    documents = [joined.join(" ".join(d.split()) for d in PythonDocs("train").documents())]

    def encode(text):
        characters.append(len(text))
        return tokenizer.encode(text, add_special_tokens=False).ids

    whole = contiguous_windows(documents, encode, 64)
    for limit in (1, 3, 50, len(whole)):
        assert torch.equal(contiguous_windows(documents, encode, 64, limit=limit), whole[:limit])
    characters.clear()
    contiguous_windows(documents, encode, 64, limit=3)
    assert sum(characters) < 0.1 * len(documents[0])


def test_the_parts_of_the_embedded_corpus_do_not_overlap():
    texts = {part: "\n\n".join(PythonDocs(part).documents()) for part in ("train", "calibration", "evaluation")}
    total = sum(map(len, texts.values()))
    assert total > 250_000
    assert len(texts["train"]) > 0.6 * total
    assert min(map(len, texts.values())) > 0.1 * total
    paragraphs = {part: {" ".join(p.split()) for p in text.split("\n\n")} for part, text in texts.items()}
    flat = {part: " ".join(text.split()) for part, text in texts.items()}
    for part in texts:
        for other in texts:
            if part == other:
                continue
            shared = {p for p in paragraphs[part] & paragraphs[other] if p}
            assert not shared
            # Nor does a longer stretch of one stand in the other under another paragraph break.
            long = [p for p in paragraphs[part] if len(p) > 200]
            assert sum(p in flat[other] for p in long) <= 0.01 * len(long)


def test_local_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i}\n" for i in range(100)))
    parts = [TextFile(str(text), part).documents()[0] for part in ("train", "calibration", "evaluation")]
    assert "".join(parts) == text.read_text()
    assert [p.count("\n") for p in parts] == [70, 15, 15]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"body": f"document {i}"}) + "\n" for i in range(10)))
    assert TextFile(str(lines), field="body").documents() == [f"document {i}" for i in range(10)]
    (tmp_path / "separator.jsonl").write_text('{"text": "a\u2028b"}\n' * 9 + "no json\n")
    assert TextFile(str(tmp_path / "separator.jsonl"), "train").documents() == ["a\u2028b"] * 7
    with pytest.raises(ValueError, match="line 10 is no JSON"):
        TextFile(str(tmp_path / "separator.jsonl"), "evaluation").documents()
    with pytest.raises(ValueError, match="line 1 is no JSON object with a 'text' field"):
        TextFile(str(lines)).documents()
    with pytest.raises(ValueError, match="no text file at"):
        TextFile(str(tmp_path / "absent.txt")).documents()
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        TextFile(str(tmp_path / "empty.txt")).documents()
    (tmp_path / "short.txt").write_text("one line")
    with pytest.raises(ValueError, match="holds no text in its calibration part"):
        TextFile(str(tmp_path / "short.txt"), "calibration").documents()


def test_datasets_on_disk_are_read_through_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "", "b")))
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    assert HubText(**source).documents() == ["a", "", "b"]
    assert HubText(**source, join="\n\n").documents() == ["a\n\n\n\nb"]
    assert HubText(**source, limit=2).documents() == ["a", ""]
    mixed = json_lines(tmp_path / "mixed.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(
        ValueError, match=r"mixed\.jsonl: row 2 holds None \(null\) in its 'text' field; its keys are body"
    ):
        HubText("json", data_files=mixed, join=" ").documents()
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(ValueError, match=r"torn\.jsonl cannot be read: JSON parse error: Missing a closing quotation"):
        HubText("json", data_files=str(tmp_path / "torn.jsonl")).documents()


WRONG = {
    "null": (None, r"None \(null\)"),
    "number": (5, r"5 \(int\)"),
    "bool": (True, r"True \(bool\)"),
    "dict": ({"a": 1}, r"\{'a': 1\} \(dict\)"),
    "texts": (["a", "b"], r"\['a', 'b'\] \(list\)"),
    "no messages": ([], r"\[\] \(list\)"),
    "other messages": ([{"from": "human", "value": "a"}], r"\[\{'from': 'human', 'value': 'a'\}\] \(list\)"),
}


def hub_rows(monkeypatch, values, **settings):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: values)
    return HubText("a/set", **settings)


def json_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.mark.parametrize("kind", WRONG)
def test_a_row_that_is_no_text_is_refused_by_its_number(tmp_path, monkeypatch, tokenizer, kind):
    value, shown = WRONG[kind]
    values = [{"text": "good"}, {"text": ""}, {"text": value, "id": 7}]
    path = json_lines(tmp_path / "a.jsonl", values)
    message = (
        rf"a\.jsonl: line 3 holds {shown} in its 'text' field; {'its keys are id' if value is None else 'accepted'}"
    )
    with pytest.raises(ValueError, match=message):
        TextFile(path).documents()
    with pytest.raises(ValueError, match=message):
        TokenDataModule(tokenizer, *[TextFile(path)] * 3, seq_len=2, calibration_windows=1).setup("fit")
    for join in (None, " "):
        with pytest.raises(ValueError, match=rf"a/set train: row 3 holds {shown} in its 'text' field"):
            hub_rows(monkeypatch, values, join=join).documents()
    good = values[:2]
    assert TextFile(json_lines(tmp_path / "good.jsonl", good)).documents() == ["good", ""]
    assert hub_rows(monkeypatch, good, join=" ").documents() == ["good "]


def test_a_missing_field_lists_the_keys_and_names_a_chat(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "hi"}]
    values = [{"text": "a"}, {"id": 1, "messages": chat}]
    path = json_lines(tmp_path / "a.jsonl", values)
    keys = r"its keys are id, messages\. field=\"messages\" reads the chat in it"
    with pytest.raises(ValueError, match=rf"line 2 is no JSON object with a 'text' field; {keys}"):
        TextFile(path).documents()
    filled = [{"text": "a", "id": None, "messages": None}, {"text": None} | values[1]]  # as `datasets` reads the file
    with pytest.raises(ValueError, match=rf"row 2 holds None \(null\) in its 'text' field; {keys}"):
        hub_rows(monkeypatch, filled).documents()
    with pytest.raises(ValueError, match=r"row 1 is no record with a 'body' field; its keys are text\. .* with field="):
        hub_rows(monkeypatch, values, field="body").documents()
    with pytest.raises(ValueError, match=r"'text' field; no other key holds a value"):
        hub_rows(monkeypatch, [{}]).documents()
    for line, shown in (('"text"', r"'text' \(str\)"), ('[{"text": "a"}]', r"\[\{'text': 'a'\}\] \(list\)")):
        (tmp_path / "b.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
        with pytest.raises(ValueError, match=rf"line 3 is no JSON object with a 'text' field: it is {shown}"):
            TextFile(str(tmp_path / "b.jsonl")).documents()


def test_how_a_file_is_written_does_not_change_what_is_read(tmp_path):
    plain = '{"text": "a\u00e9"}\n{"text": "b"}\n'.encode()
    for name, written in {
        "plain.jsonl": plain,
        "mark.jsonl": b"\xef\xbb\xbf" + plain,
        "crlf.jsonl": plain.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n" + plain.replace(b"\n", b"\n \n"),
        "UPPER.JSONL": plain,
        "lines.json": plain,
        "other.ndjson": plain,
    }.items():
        (tmp_path / name).write_bytes(written)
        assert TextFile(str(tmp_path / name)).documents() == ["a\u00e9", "b"]
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert TextFile(str(tmp_path / "mark.txt")).documents() == ["one\ntwo\n"]
    for name, written, message in (
        ("latin.jsonl", plain.replace(b"\xc3\xa9", b"") + b'{"text": "\xe9"}\n', "line 3 has the byte 0xe9"),
        ("wide.txt", "text".encode("utf-16"), "line 1 has the byte 0xff"),
        ("half.jsonl", b'{"text": "a\\ud83d"}\n', "line 1 holds half of a character"),
        ("torn.jsonl", plain + b'{"text": "c', "line 3 is no JSON object with a 'text' field: Unterminated"),
        ("pretty.json", b'[\n{"text": "a"}\n]\n', "line 1 is no JSON object"),
    ):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            TextFile(str(tmp_path / name)).documents()


PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CALLS = PLAIN.replace("{% endfor %}", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}")
USERS_ONLY = PLAIN.replace("<", "{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}<")


def calibrated(tokenizer, source, seq_len=8, windows=1, **settings):
    """The text of the calibration windows."""
    docs = PythonDocs("evaluation")
    sizes = {"train_windows": 1, "evaluation_windows": 1, "calibration_windows": windows}
    data = TokenDataModule(tokenizer, docs, source, docs, seq_len=seq_len, **sizes, **settings)
    data.setup("fit")
    return [tokenizer.decode(window.tolist()) for window in data.calibration_windows]


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_chats_are_written_by_the_tokenizers_template(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    written = "<user>hello<assistant>you"
    parts = [{"type": "text", "text": "hel", "image": None}, {"type": "text", "text": "lo"}]
    same = [chat, [{"role": "user", "content": parts}, chat[1] | {"tool_calls": None}]]
    for messages in same:
        source = TextFile(json_lines(tmp_path / "a.jsonl", [{"messages": messages}]), field="messages")
        assert calibrated(with_template(PLAIN), source, len(written)) == [written]
        source = hub_rows(monkeypatch, [{"messages": messages}], field="messages")
        assert calibrated(with_template(PLAIN), source, len(written)) == [written]
    calling = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    source = hub_rows(monkeypatch, [{"messages": [chat[0], calling]}], field="messages")
    assert calibrated(with_template(CALLS), source, 24) == ["<user>hello<assistant>add"[:24]]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [{"role": "user", "content": "a"}], "holds a chat, and the tokenizer of .* has no chat template"),
        (USERS_ONLY, [{"role": "system", "content": "a"}], "chat template refuses this chat: users only"),
        (
            "{{ 'good' if messages[0].content == 'good' else 'a' + 1 }}",
            [{"role": "user", "content": "a"}],
            "chat template refuses this chat: .*str",
        ),
        (PLAIN, [{"role": "user", "content": None}], "message 1 needs a role and a content that are texts"),
        (PLAIN, [{"role": "user", "content": 5}], "message 1 needs a role and a content that are texts"),
        (PLAIN, [{"role": "user"}], "message 1 needs a role and a content that are texts"),
        (PLAIN, [{"role": "user", "content": "a", "tool_calls": [{"name": "add"}]}], "it has no place for tool calls"),
        (
            PLAIN,
            [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image", "url": "a.png"}]}],
            "message 2 has parts that are no text: .*a.png",
        ),
    ],
)
def test_a_chat_that_cannot_be_written_is_refused(tmp_path, template, messages, message):
    good = [{"role": "user", "content": "good"}]
    path = json_lines(
        tmp_path / "a.jsonl", [{"messages": messages if template is None else good}, {"messages": messages}]
    )
    with pytest.raises(ValueError, match=rf"a\.jsonl: line {1 if template is None else 2}\b.*{message}"):
        calibrated(with_template(template), TextFile(path, field="messages"))


def test_chats_are_not_joined_by_a_corpus_and_others_documents_are_looked_at(monkeypatch, tokenizer):
    values = [{"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(
        ValueError, match=r"a/set train: join=' ' joins texts, and 'messages' holds chats; leave join out"
    ):
        hub_rows(monkeypatch, values, field="messages", join=" ").documents()

    class Mine:
        title = "mine"

        def documents(self):
            return ["a text", None]

    with pytest.raises(ValueError, match=r"the calibration corpus, mine: document 2 is None \(null\), and no text"):
        calibrated(tokenizer, Mine())


def test_short_rows_are_joined_where_none_fills_a_window(tmp_path):
    tokenizer, documents = byte_tokenizer(), [f"row {number:03d} of a file" for number in range(100)]
    source = TextFile(json_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents]))
    docs = PythonDocs("evaluation")

    def data(**settings):
        sizes = {"seq_len": 100, "train_windows": 1, "evaluation_windows": 1} | settings
        made = TokenDataModule(tokenizer, docs, source, docs, **({"calibration_windows": 9} | sizes))
        made.setup("fit")
        return made

    joined = data()
    assert joined.text_setting == {"bos": False, "calibration_rows": "joined"}
    assert joined.calibration_windows.shape == (9, 100)
    text = "".join(tokenizer.decode(window.tolist()) for window in joined.calibration_windows)
    pieces = text.split("\n\n")
    assert set(pieces[:-1]) <= set(documents)
    assert len(set(pieces)) == len(pieces)
    assert torch.equal(joined.calibration_windows, data(join_rows=True).calibration_windows)
    assert not torch.equal(joined.calibration_windows, data(seed=1).calibration_windows)
    with pytest.raises(
        ValueError, match=r"a\.jsonl: asked for 9 .* join the rows: with join_rows=True they fill about 18"
    ):
        data(join_rows=False)
    # Rows that are long enough are left as they were before there was a choice.
    encode = data()._encode
    short = data(seq_len=10)
    assert short.text_setting["calibration_rows"] == "separate"
    assert torch.equal(short.calibration_windows, random_windows(documents, encode, 9, 10, 0))
    assert data(seq_len=10, join_rows=True).text_setting["calibration_rows"] == "joined"
    some = [{"text": text} for text in documents] + [{"text": "long " * 40}]
    source = TextFile(json_lines(tmp_path / "b.jsonl", some))
    with pytest.raises(ValueError, match=r"holds 2\. .*with join_rows=True they fill about 21"):
        data()


def characters(*, begins):
    """A tokenizer of single characters that has a BOS, and may begin texts with it."""
    known = sorted(
        set("".join("".join(PythonDocs(part).documents()) for part in ("train", "calibration", "evaluation")))
    )
    vocabulary = {"<bos>": 0, "<unk>": 1} | {character: 2 + place for place, character in enumerate(known)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if begins:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def test_every_window_begins_with_bos_where_the_tokenizer_begins_a_text_with_it():
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    sizes = {"seq_len": 32, "train_windows": 5, "calibration_windows": 6, "evaluation_windows": 4}

    def windows(begins, **settings):
        data = TokenDataModule(characters(begins=begins), *corpora, evaluate="python_docs", **sizes, **settings)
        data.setup("fit")
        loaded = [batch["input_ids"] for batch in (*data.train_dataloader(), *data.calibration_dataloader())]
        assert all(ids.shape[1] == 32 and bool((ids[:, 0] == 0).all()) is data.bos for ids in loaded)
        further = data.further_evaluation["python_docs"][1]
        return data, [data.train_windows, data.calibration_windows, data.evaluation_windows, further]

    tokenizer = characters(begins=True)
    for begins, settings in ((True, {}), (False, {"bos": True})):
        data, found = windows(begins, **settings)
        assert data.bos
        assert data.text_setting == {"bos": True, "calibration_rows": "separate"}
        assert data.setting["bos"] is True
        assert data.evaluation_title == "Python language reference (evaluation), BOS first"
        assert data.further_evaluation["python_docs"][0] == data.evaluation_title
        for kind in found:
            assert kind.shape[1] == 32
            assert (kind == 0).nonzero()[:, 1].tolist() == [0] * len(kind)
        for kind, source in ((found[0], corpora[0]), (found[2], corpora[2]), (found[3], corpora[2])):
            text = "\n\n".join(source.documents())[: len(kind) * 31]
            assert "".join(tokenizer.convert_ids_to_tokens(kind[:, 1:].flatten().tolist())) == text
        drawn = ["".join(tokenizer.convert_ids_to_tokens(window)) for window in found[1][:, 1:].tolist()]
        assert all(any(text in document for document in corpora[1].documents()) for text in drawn)
        assert len(set(drawn)) == 6
    for begins, settings in ((False, {}), (True, {"bos": False})):
        data, found = windows(begins, **settings)
        assert not data.bos
        assert data.text_setting["bos"] is False
        assert data.evaluation_title == "Python language reference (evaluation)"
        assert not any((kind == 0).any() for kind in found)
        assert torch.equal(found[2], contiguous_windows(corpora[2].documents(), data._encode, 32, limit=4))
        assert torch.equal(found[1], random_windows(corpora[1].documents(), data._encode, 6, 32, 0))


def test_a_template_that_begins_with_bos_adds_no_second_one(tmp_path):
    tokenizer = characters(begins=True)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    path = json_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hello you"}]}])
    data = TokenDataModule(tokenizer, *[TextFile(path, field="messages")] * 3, seq_len=16, calibration_windows=1)
    data.setup("fit")
    for windows in (data.train_windows, data.calibration_windows):
        assert windows.tolist()[0] == tokenizer("user: hello you")["input_ids"]


def test_a_tokenizer_without_bos_cannot_begin_with_it(tokenizer):
    corpora = [PythonDocs("calibration")] * 3
    assert not TokenDataModule(tokenizer, *corpora).bos
    with pytest.raises(ValueError, match="bos=True, and the tokenizer of .* has no BOS token: leave bos out"):
        TokenDataModule(tokenizer, *corpora, bos=True)


def test_the_setting_tells_bos_and_joined_rows_and_is_else_as_before():
    corpora = [PythonDocs("calibration")] * 3

    def setting(begins=False, **settings):
        return TokenDataModule(characters(begins=begins), *corpora, **settings).setting

    assert setting() == setting(bos=False) == setting(join_rows=False) == setting(begins=True, bos=False)
    assert list(setting()) == [
        *("calibration", "evaluation", "calibration_source", "evaluation_source"),
        *("calibration_windows", "evaluation_windows", "seq_len", "seed"),
    ]
    assert setting(begins=True) == setting(bos=True) == setting() | {"bos": True}
    assert setting(join_rows=True) == setting() | {"calibration_source": "PythonDocs(part='calibration'), rows joined"}


def test_recipes_leave_bos_to_the_tokenizer_but_for_the_papers_models():
    recipes = Path(__file__).parents[1] / "recipes"
    for model in (recipes / "model").glob("*.yaml"):
        for data in (recipes / "data").glob("*.yaml"):
            cfg = OmegaConf.create({"model": OmegaConf.load(model), "data": OmegaConf.load(data)})
            if data.stem == "digits":  # images
                continue
            assert cfg.data.bos is (False if model.stem in ("llama2_7b", "opt_125m") else None)
            assert cfg.data.join_rows is None


def test_the_data_module(tokenizer):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    data = TokenDataModule(
        tokenizer, *corpora, seq_len=64, batch_size=3, train_windows=10, calibration_windows=6, evaluation_windows=5
    )
    data.setup("fit")
    assert [batch["input_ids"].shape[0] for batch in data.train_dataloader()] == [3, 3, 3, 1]
    assert sum(len(b["input_ids"]) for b in data.calibration_dataloader()) == 6
    assert data.evaluation_windows.shape == (5, 64)
    assert tokenizer.decode(data.evaluation_windows[0].tolist()) in "\n\n".join(corpora[2].documents())
    assert data.evaluation_title == "Python language reference (evaluation)"


def test_a_tokenizer_without_a_vocabulary_is_named():
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), name_or_path="models/mine")
    data = TokenDataModule(empty, *(PythonDocs(part) for part in ("train", "calibration", "evaluation")), seq_len=8)
    with pytest.raises(ValueError, match="the tokenizer of models/mine makes no token of text"):
        data.setup("fit")


def test_bad_corpora_are_named(tokenizer, tmp_path):
    docs = PythonDocs("train")
    with pytest.raises(
        ValueError, match=r"the calibration corpus, Python language reference \(calibration\): asked for 9999"
    ):
        TokenDataModule(tokenizer, docs, PythonDocs("calibration"), docs, seq_len=64, calibration_windows=9999).setup(
            "fit"
        )
    (tmp_path / "short.txt").write_text("short")
    short = TextFile(str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"the evaluation corpus, short.txt: the text has 5 tokens"):
        TokenDataModule(tokenizer, docs, docs, short, seq_len=64, calibration_windows=2).setup("fit")


def test_a_loader_goes_on_where_the_data_was_with_other_batches():
    windows = Windows(torch.arange(48)[:, None])

    def loader(rows, ranks=1, rank=0):
        return ResumableLoader(windows, rows, sampler=Shuffled(windows, ranks, rank, seed=3))

    def read(batches):
        return [int(row) for batch in batches for row in batch["input_ids"]]

    whole = read(loader(4))
    halves = [loader(2, 2, rank) for rank in (0, 1)]
    first = [read(islice(half, 5)) for half in halves]
    assert sorted(first[0] + first[1]) == sorted(whole[:20])
    same, other = loader(4), loader(2)
    same.load_state_dict(halves[0].state_dict())
    assert read(same) == whole[20:]
    with pytest.warns(UserWarning, match=r"4 windows at a time, and now it is 2 \(batch_size x processes\)"):
        other.load_state_dict(halves[0].state_dict())
    assert read(other) == whole[20:]
