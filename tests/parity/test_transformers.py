"""Logits, selection and gradients against the implementation in transformers, with the same parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from numerics import quick_jit, relative  # noqa: E402
from small_model import (  # noqa: E402
    logits_of,
    next_token_loss,
    random_model,
    random_tokens,
    seed_with_margin,
    small_config,
    through_layers,
    variables,
    with_config,
)
from transformers_model import RecordedSelection, as_mask, hf_model, tree_from_state_dict  # noqa: E402

pytestmark = pytest.mark.parity

LENGTH = 600
FORMS = {"mha": LENGTH, "mqa": 64}  # dense_attention_max_length
YARN = {"max_position_embeddings": 163840}
ONE_BLOCK = {"attention_block_size": LENGTH}  # compiles faster
MARGIN = 4e-6  # of the k-th score, as a share of the largest in its row
ALL_KEYS = ONE_BLOCK | {"index_topk": LENGTH}  # where attention is not the point


@quick_jit
def _selection(model, tokens, positions, segment_ids):
    """Selected keys of every layer, [L, B, T, K]."""

    def of_layer(layer, x, rope, segment_ids):
        return layer.self_attn.selected(layer.input_layernorm(x), rope, segment_ids)

    return jnp.concatenate(through_layers(model, of_layer, tokens, positions, segment_ids))


class Both:
    """A model, its counterpart in transformers, and a batch of documents with padding behind them.

    Parameters and tokens are of the first seed, from ``seed`` on, where no two scores at the k-th place are nearly
    equal: there any two programs, the two forms of attention for instance, may select either and differ by 6e-4.
    """

    def __init__(self, changes: dict, *, seed: int, lengths=(LENGTH,), first_position: int = 0):
        config, shape = small_config(**changes), (len(lengths), max(lengths))
        self.positions = np.broadcast_to(first_position + np.arange(shape[1], dtype=np.int32), shape)
        seed = seed_with_margin(dataclasses.replace(config, **ONE_BLOCK), shape, MARGIN, self.positions, seed)
        self.model = random_model(config, seed)
        self.theirs = hf_model(self.model)
        self.tokens = random_tokens(config, shape, seed)
        self.real = np.arange(shape[1]) < np.array(lengths)[:, None]
        self.segment_ids = self.real.astype(np.int32)

    def their_logits(self):
        """Logits of transformers, which must have selected what we do."""
        inputs = {
            "input_ids": torch.tensor(self.tokens, dtype=torch.long),
            "attention_mask": torch.tensor(self.real, dtype=torch.long),
            "position_ids": torch.tensor(self.positions, dtype=torch.long),
        }
        with RecordedSelection(self.tokens.shape[1]) as recorded:
            logits = self.theirs(**inputs).logits
        if 0 < self.model.config.index_topk < LENGTH:
            self.check_selection(recorded.masks)
        return logits

    def check_selection(self, theirs: list[np.ndarray]) -> None:
        model = with_config(self.model, **ONE_BLOCK)
        selected = _selection(model, self.tokens, self.positions, self.segment_ids)
        ours = as_mask(np.asarray(selected), self.tokens.shape[1])
        assert len(theirs) == self.model.config.num_hidden_layers
        differs = np.any(np.stack(theirs) != ours, axis=-1) & self.real
        assert not differs.any(), (
            f"other keys at (layer, sequence, token) {np.argwhere(differs)[:10].tolist()}"
        )

    @functools.cached_property
    def their_real_logits(self) -> np.ndarray:
        with torch.no_grad():
            return self.their_logits().numpy()[self.real]

    def our_real_logits(self, form: str) -> np.ndarray:
        model = with_config(self.model, dense_attention_max_length=FORMS[form])
        return np.asarray(logits_of(model, self.tokens, self.positions, self.segment_ids))[self.real]


_CASES = {
    "without YaRN": lambda: Both({}, seed=13),
    "with YaRN": lambda: Both(YARN, seed=36),
    "with YaRN beyond the original context": lambda: Both(YARN, seed=36, first_position=5000),
    "documents of different length": lambda: Both({}, seed=3, lengths=(LENGTH, 413)),
    "one group of experts": lambda: Both(ALL_KEYS | {"n_group": 1, "topk_group": 1}, seed=13),
    "eight groups of experts": lambda: Both(ALL_KEYS | {"n_group": 8, "topk_group": 2}, seed=13),
    "two shared experts": lambda: Both(ALL_KEYS | {"n_shared_experts": 2}, seed=32),
    "V3": lambda: Both({"index_topk": 0}, seed=0),
    "V3 with YaRN": lambda: Both({"index_topk": 0} | YARN, seed=0),
}


@functools.cache
def both(case: str) -> Both:
    return _CASES[case]()


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in list(_CASES)[:4] for form in FORMS]
    + [(case, "mha") for case in list(_CASES)[4:]],
)
def test_logits(case, form):
    theirs = both(case).their_real_logits
    assert relative(both(case).our_real_logits(form), theirs) < 1e-5


@functools.cache
def _their_gradients(case: str) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token cross entropy by the paths of our tree; 0 for what has none."""
    logits = both(case).their_logits()[:, :-1]
    targets = torch.tensor(both(case).tokens[:, 1:], dtype=torch.long)
    both(case).theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    named = dict(both(case).theirs.named_parameters())
    gradients = {}
    for name, value in both(case).theirs.state_dict().items():
        gradient = named[name].grad if name in named else None
        gradients[name] = torch.zeros_like(value).numpy() if gradient is None else gradient.numpy()
    return tree_from_state_dict(both(case).model.config, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_language_model_loss(form, remat):
    _check_gradient("without YaRN", form, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_gradient_through_several_blocks_at_a_time(form):
    _check_gradient("without YaRN", form, remat="layer", attention_block_size=110)


@pytest.mark.slow
def test_gradient_of_the_language_model_loss_of_v3():
    _check_gradient("V3 with YaRN", "mha", remat="layer")


def _check_gradient(case: str, form: str, **changes) -> None:
    how = {"attention_block_size": 320, "dense_attention_max_length": FORMS[form]} | changes
    model = with_config(both(case).model, **how)
    theirs = _their_gradients(case)
    ours = variables(quick_jit(jax.grad(next_token_loss))(model, both(case).tokens))
    assert len(ours) == len(theirs)
    for path, variable in ours:
        value, expected = np.asarray(variable[...]), theirs[path]
        if ".indexer." in path or path.endswith("e_score_correction_bias"):
            assert not np.any(value), path
            assert not np.any(expected), path
            continue
        for layer in range(len(value)) if "_layers." in path else [...]:
            assert np.linalg.norm(expected[layer]) > 0, path
            assert relative(value[layer], expected[layer]) < 1e-3, (path, layer)
