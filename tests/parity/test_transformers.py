"""Logits, selection and gradients against the implementation in transformers, with the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_model import (  # noqa: E402
    logits_of,
    next_token_loss,
    quick_jit,
    random_model,
    random_tokens,
    relative,
    small_config,
    through_layers,
    variables,
    with_config,
)
from transformers_model import SelectionOf, hf_model, tree_from_state_dict  # noqa: E402

pytestmark = pytest.mark.parity

LENGTH = 600
FORMS = {"mha": LENGTH, "mqa": 64}  # dense_attention_max_length
YARN = {"max_position_embeddings": 163840}
ONE_BLOCK = {"attention_block_size": LENGTH}  # where attention is not the point: compiles faster


@quick_jit
def _selected(model, tokens, positions, segment_ids):
    def selected(layer, x, rope, segment_ids):
        return layer.self_attn.selected(layer.input_layernorm(x), rope, segment_ids)

    return jnp.concatenate(through_layers(model, selected, tokens, positions, segment_ids))


class Both:
    """A model, its counterpart in transformers, and a batch of documents with padding behind them."""

    def __init__(self, changes: dict, lengths=(LENGTH,), first_position: int = 0):
        self.model = random_model(small_config(**changes))
        self.theirs = hf_model(self.model)
        shape = (len(lengths), max(lengths))
        self.tokens = random_tokens(self.model.config, shape)
        self.real = np.arange(shape[1]) < np.array(lengths)[:, None]
        self.positions = np.broadcast_to(first_position + np.arange(shape[1], dtype=np.int32), shape)
        self.segment_ids = self.real.astype(np.int32)
        self.ours_selected = None
        if self.model.config.has_indexer:
            batch = (self.tokens, self.positions, self.segment_ids)
            self.ours_selected = np.asarray(_selected(with_config(self.model, **ONE_BLOCK), *batch))

    def their_logits(self):
        """Logits of transformers under our selection; fails where the two differ by more than near-ties."""
        inputs = {
            "input_ids": torch.tensor(self.tokens, dtype=torch.long),
            "attention_mask": torch.tensor(self.real, dtype=torch.long),
            "position_ids": torch.tensor(self.positions, dtype=torch.long),
        }
        if self.ours_selected is None:
            return self.theirs(**inputs).logits
        with SelectionOf(self.ours_selected, self.real) as selection:
            logits = self.theirs(**inputs).logits
        assert len(selection.scores) == self.model.config.num_hidden_layers
        assert selection.exchanged_rows <= 5, "near-ties cannot be that common"
        return logits

    @functools.cached_property
    def their_real_logits(self) -> np.ndarray:
        with torch.no_grad():
            return self.their_logits().numpy()[self.real]

    def our_real_logits(self, form: str) -> np.ndarray:
        model = with_config(self.model, dense_attention_max_length=FORMS[form])
        return np.asarray(logits_of(model, self.tokens, self.positions, self.segment_ids))[self.real]


_CASES = {
    "without YaRN": lambda: Both({}),
    "with YaRN": lambda: Both(YARN),
    "with YaRN beyond the original context": lambda: Both(YARN, first_position=5000),
    "documents of different length": lambda: Both({}, lengths=(LENGTH, 413)),
    "one group of experts": lambda: Both(ONE_BLOCK | {"n_group": 1, "topk_group": 1}),
    "eight groups of experts": lambda: Both(ONE_BLOCK | {"n_group": 8, "topk_group": 2}),
    "two shared experts": lambda: Both(ONE_BLOCK | {"n_shared_experts": 2}),
    "V3": lambda: Both({"index_topk": 0}),
    "V3 with YaRN": lambda: Both({"index_topk": 0} | YARN),
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
    assert relative(both(case).our_real_logits(form), theirs) < 2e-4


def test_another_selection_than_theirs_is_noticed():
    """Guards the tests above: what they forgive is a near-tie and nothing more."""
    case = both("without YaRN")
    selected = case.ours_selected
    row = selected[1, 0, 500]
    left_out = np.setdiff1d(np.arange(501), row)[0]
    case.ours_selected = selected.copy()
    case.ours_selected[1, 0, 500] = np.sort(np.append(row[1:], left_out))
    try:
        with pytest.raises(AssertionError, match="500"):
            case.their_logits()
    finally:
        case.ours_selected = selected


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
@pytest.mark.parametrize("remat", ["none", "layer", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_language_model_loss(form, remat):
    _check_gradient("without YaRN", dense_attention_max_length=FORMS[form], remat=remat)


@pytest.mark.slow
def test_gradient_of_the_language_model_loss_of_v3():
    _check_gradient("V3 with YaRN", remat="layer")


def _check_gradient(case: str, **changes) -> None:
    model = with_config(both(case).model, attention_block_size=256, **changes)
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
