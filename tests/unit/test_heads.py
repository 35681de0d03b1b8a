import pytest
import torch
from torch.nn import functional as F

from ofutils import UserError, data, dims, heads, hub, probes
from ofutils.families import from_hf
from ofutils.sentences import mask_tokens, sentence_batches
from ofutils.studies.bert_outliers import tasks
from ofutils.transformer import Transformer, TransformerConfig
from tests.configurations import sentences

FORM = {"causal": False, "norm_position": "post", "activation": "gelu"}
FORM |= {"embedding": {"norm": True, "skip_padding": False}}


@pytest.fixture(scope="module")
def stand_in():
    tokenizer, encoder = hub.tokenizer(hub.STAND_IN), from_hf(hub.model(hub.STAND_IN))
    batches = sentence_batches(tokenizer, sentences(64))
    return tokenizer, encoder, batches


def test_masking_asks_for_a_share_of_real_tokens_and_leaves_the_rest(stand_in):
    tokenizer, _, batches = stand_in
    asked = changed = real = masks = 0
    for seed, batch in enumerate(batches):
        masked, labels = mask_tokens(batch, tokenizer, seed)
        again, _ = mask_tokens(batch, tokenizer, seed)
        assert torch.equal(masked["input_ids"], again["input_ids"])
        special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
        assert (labels[special] == -100).all() and (labels[batch["attention_mask"] == 0] == -100).all()
        wanted = labels != -100
        assert torch.equal(labels[wanted], batch["input_ids"][wanted])
        assert torch.equal(masked["input_ids"][~wanted], batch["input_ids"][~wanted])
        asked, real = asked + int(wanted.sum()), real + int((~special).sum())
        masks += int((masked["input_ids"][wanted] == tokenizer.mask_token_id).sum())
        changed += int((masked["input_ids"] != batch["input_ids"]).sum())
    assert asked / real == pytest.approx(0.15, abs=0.03)
    assert masks / asked == pytest.approx(0.8, abs=0.08)
    assert changed / asked == pytest.approx(0.9, abs=0.08)


def test_pairs_are_functions_without_their_docstring():
    found = tasks.pairs(data.load_corpus(), 50)
    assert len({sentence for sentence, _ in found}) == 50
    for sentence, code in found:
        assert "def " in code and sentence not in " ".join(code.split())


def test_maskable_tokens_are_real_and_not_special(stand_in):
    tokenizer, _, batches = stand_in
    ids = heads.maskable(batches, tokenizer)
    expected = [id for batch in batches for id in batch["input_ids"].flatten().tolist()]
    assert ids.tolist() == [id for id in expected if id not in tokenizer.all_special_ids]
    assert tokenizer.pad_token_id in expected and len(ids) > 500


def test_a_trained_mlm_head_beats_the_frequencies_on_other_text_and_leaves_the_encoder_alone(stand_in):
    tokenizer, encoder, batches = stand_in
    before = [parameter.clone() for parameter in encoder.parameters()]
    train, held = batches[:-1], batches[-1:]
    masked = [mask_tokens(batch, tokenizer, 10 * seed + i) for seed in range(4) for i, batch in enumerate(train)]
    head = heads.train_mlm_head(encoder, masked, steps=60, seed=1, lr=1e-2)
    tests = [mask_tokens(batch, tokenizer, seed) for seed in range(90, 100) for batch in held]
    ids = torch.cat([labels[labels != -100] for _, labels in tests])
    known = heads.unigram(heads.maskable(train, tokenizer), encoder.config.vocab)
    assert heads.mlm_loss(encoder, head, tests) < -float(known[ids].mean())
    again = heads.train_mlm_head(encoder, masked, steps=60, seed=1, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before, strict=True))


def test_a_split_model_computes_the_same_loss(stand_in):
    torch.manual_seed(0)
    config = TransformerConfig(vocab=90, layers=2, width=16, heads=2, context=64, **FORM, head="mlm")
    model = Transformer(config).eval()
    batch = {"input_ids": torch.randint(5, 90, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    labels = torch.where(torch.rand(3, 9) < 0.4, batch["input_ids"], -100)
    encoder, head = heads.split(model)
    with torch.no_grad():
        expected = F.cross_entropy(probes.run(model, batch).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert heads.mlm_loss(encoder, head, [(batch, labels)]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="no MLM head, but none"):
        heads.split(encoder)


def test_ablation_reaches_the_loss(stand_in):
    tokenizer, encoder, batches = stand_in
    masked = [mask_tokens(batch, tokenizer, 0) for batch in batches]
    head = heads.train_mlm_head(encoder, masked, steps=20)
    whole = heads.mlm_loss(encoder, head, masked)
    with dims.ablated(encoder, range(encoder.config.width // 2)):
        assert heads.mlm_loss(encoder, head, masked) != pytest.approx(whole, abs=1e-4)
    assert heads.mlm_loss(encoder, head, masked) == whole
