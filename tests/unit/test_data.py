import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from ofutils import UserError, data
from ofutils.batches import Ahead, Batches, fixed_batches


def test_the_standard_library_is_split_by_file_without_its_tests():
    corpus = data.load_corpus("stdlib")
    names = [name for name, _ in corpus.documents]
    assert "json/decoder.py" in names and names == sorted(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    train, validation = (list(corpus.split(name)) for name in ("train", "validation"))
    assert len(train) + len(validation) == len(names)
    assert not set(train) & {text for text in validation if len(text) > 200}


def test_a_cap_shortens_the_training_text_and_changes_the_name(corpus):
    whole, capped = data.load_corpus(str(corpus)), data.load_corpus(str(corpus), 5000)
    assert sum(map(len, capped.split("train"))) == 5000
    assert whole.sha256 != capped.sha256


def parquet(path, texts):
    pyarrow.parquet.write_table(pa.table({"title": ["t"] * len(texts), "text": texts}), path, row_group_size=7)


def test_a_text_a_parquet_file_and_a_folder_of_them_are_the_same_corpus(out, tmp_path):
    texts = [f"paragraph {index} of a text" if index % 5 else " " for index in range(3000)]
    (tmp_path / "one.txt").write_text("\n\n".join(texts))
    parquet(tmp_path / "one.parquet", [text or None for text in texts])
    (tmp_path / "folder").mkdir()
    for part in range(3):
        parquet(tmp_path / "folder" / f"{part}.parquet", texts[part * 1000 : (part + 1) * 1000])
    first, *others = (data.load_corpus(str(tmp_path / name)) for name in ("one.txt", "one.parquet", "folder"))
    assert len(first.documents) == 2400 and first.documents[0] == ("000000001", texts[1])
    tokens = data.tokenize(first, 300)
    for other in others:
        assert list(other.documents) == list(first.documents) and other.documents[-1] == first.documents[-1]
        assert other.sha256 == first.sha256 and list(other.ranked) == list(first.ranked)
        again = data.tokenize(other, 300)
        assert np.array_equal(again.train, tokens.train) and np.array_equal(again.validation, tokens.validation)


def test_parquet_text_and_tokens_stay_on_disk(out, tmp_path):
    parquet(tmp_path / "large.parquet", [f"{index} " * 20_000 for index in range(100)])
    corpus = data.load_corpus(str(tmp_path / "large.parquet"))
    before = pa.total_allocated_bytes()
    assert sum(len(text) for _, text in corpus.documents) > 5_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
    tokens = data.tokenize(corpus, 300)
    assert isinstance(tokens.train, np.memmap) and isinstance(tokens.validation, np.memmap)
    assert len(list((out / "runs" / "text").iterdir())) == 1
    (tmp_path / "large.parquet").write_bytes(b"no parquet")
    data.load_corpus.cache_clear()
    with pytest.raises(UserError, match="is not a readable parquet file"):
        data.load_corpus(str(tmp_path / "large.parquet"))
    assert len(list((out / "runs" / "text").iterdir())) == 1


def test_tokens_decode_to_the_text_and_come_from_the_cache(out, corpus, monkeypatch):
    loaded = data.load_corpus(str(corpus))
    tokens = data.tokenize(loaded, 300)
    text = tokens.tokenizer.decode(tokens.train[:2000].tolist(), skip_special_tokens=False)
    assert text.startswith(next(loaded.split("train")))
    assert int(tokens.train.max()) < 300
    data.tokenize.cache_clear()
    monkeypatch.setattr(data, "_train_bpe", lambda *_: pytest.fail("trained again"))
    assert np.array_equal(data.tokenize(loaded, 300).train, tokens.train)


def test_an_epoch_visits_every_chunk_once_and_the_next_in_another_order():
    batches = Batches(np.arange(640), batch=4, context=16, seed=3)
    first, second = (torch.cat([batches.at(epoch + number) for number in range(10)]) for epoch in (0, 10))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(0, 640, 16))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert torch.equal(first[0], torch.arange(16) + first[0, 0])


def test_the_number_alone_decides_the_batch():
    straight = Batches(np.arange(640), 4, 16, seed=1)
    drawn = [straight.at(number) for number in range(25)]
    for number in (24, 7, 19, 0):
        assert torch.equal(straight.at(number), drawn[number])
        assert torch.equal(Batches(np.arange(640), 4, 16, seed=1).at(number), drawn[number])
    assert not torch.equal(Batches(np.arange(640), 4, 16, seed=2).at(0), drawn[0])


def test_batches_made_ahead_are_the_same_in_every_order():
    plain = Batches(np.arange(640), 4, 16, seed=1)
    ahead = Ahead(Batches(np.arange(640), 4, 16, seed=1), slice(1, None, 2), torch.device("cpu"))
    for number in (0, 1, 2, 9, 10, 11, 3, 3, 20, 0):
        assert torch.equal(ahead.at(number), plain.at(number)[1::2])


def test_fixed_batches_are_fixed_and_spread_over_the_split():
    found = fixed_batches(np.arange(1600), 3, 2, 16)
    again = fixed_batches(np.arange(1600), 3, 2, 16)
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert found[0][0, 0] == 0 and found[-1][-1, -1] == 1599
    assert len(fixed_batches(np.arange(100), 8, 2, 16)) == 3  # all there are


def test_bad_corpora_are_one_clear_line(tmp_path, out):
    with pytest.raises(UserError, match="'sdtlib': no such file or folder .did you mean 'stdlib'"):
        data.load_corpus("sdtlib")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 documents"):
        data.load_corpus(str(tmp_path / "empty"))
    (tmp_path / "one.txt").write_text("a single paragraph")
    with pytest.raises(UserError, match="holds 1 documents"):
        data.load_corpus(str(tmp_path / "one.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="neither readable UTF-8 text nor parquet"):
        data.load_corpus(str(tmp_path / "binary.txt"))
    (tmp_path / "short.txt").write_text("a few words\n\nand a few more")
    short = data.tokenize(data.load_corpus(str(tmp_path / "short.txt")), 300)
    with pytest.raises(
        UserError, match=r"too short: its training split has \d+ tokens, one batch of 8 x 128 needs 1024"
    ):
        Batches(short.train, 8, 128)
    with pytest.raises(UserError, match="its validation split"):
        fixed_batches(short.validation, 1, 8, 128)
    with pytest.raises(UserError, match="at least 257"):
        data.tokenize(data.load_corpus(str(tmp_path / "short.txt")), 100)
    pyarrow.parquet.write_table(pa.table({"n": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match="needs a string column named text; it has n"):
        data.load_corpus(str(tmp_path / "numbers.parquet"))
