import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from dgc import row_sparse_names
from tests.tolerances import assert_close
from tests.unit.workloads.activations import Made
from workloads.language_models import LSTMLanguageModel, TransformerLanguageModel

V, T, B = 60, 7, 3
KINDS = ("full", "adaptive", "sampled")


def make_lstm(kind="full", **options):
    shape = {"embedding_dim": 12, "hidden_dim": 16, "dropout": 0.0, **options}
    return LSTMLanguageModel(V, softmax=kind, num_samples=16, cutoffs=(20,), **shape)


def make_projected(kind="full", **options):
    return make_lstm(kind, hidden_dim=24, projection_dim=16, **options)


def make_transformer(kind="full", **options):
    shape = {"width": 16, "num_heads": 2, "num_layers": 2, "feedforward": 24, "dropout": 0.0}
    shape |= {"max_positions": T, **options}
    return TransformerLanguageModel(V, softmax=kind, num_samples=16, cutoffs=(20,), **shape)


MODELS = (make_lstm, make_projected, make_transformer)


def text(num_positions=T):
    words = torch.randint(V, (num_positions + 1, B))
    return words[:-1], words[1:]


def only(targets, position):
    """Return the targets of which one position counts."""
    return torch.where(torch.arange(len(targets))[:, None] == position, targets, -100)


@pytest.mark.parametrize("projection_dim", [None, 10])
@torch.no_grad()
def test_the_lstm_is_torchs_between_embedding_and_softmax(projection_dim):
    torch.manual_seed(0)
    model = make_lstm(projection_dim=projection_dim, num_layers=3).eval()
    reference = torch.nn.LSTM(12, 16, num_layers=3, proj_size=projection_dim or 0)
    for i, layer in enumerate(model.layers):
        for name, weight in layer.named_parameters():
            getattr(reference, name.replace("_l0", f"_l{i}")).copy_(weight)
    words, targets = text()
    outputs, (h, c) = reference(model.embedding(words))
    loss, state = model(words, targets)
    logits = model.softmax.linear(outputs)
    assert_close(loss, functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert_close(state[0], h)
    assert_close(state[1], c)


@pytest.mark.parametrize("make", [make_lstm, make_projected])
def test_the_state_goes_on_where_the_text_before_ended_and_carries_no_gradient(make):
    torch.manual_seed(0)
    model = make().eval()
    words, targets = text(8)
    whole, end = model(words, targets)
    first, state = model(words[:3], targets[:3])
    second, state_at_end = model(words[3:], targets[3:], state)
    assert_close((3 * first + 5 * second) / 8, whole)
    for found, expected in zip(state_at_end, end, strict=True):
        assert_close(found, expected)
    assert not any(tensor.requires_grad for tensor in (*state, *state_at_end))
    afresh, _ = model(words[3:], targets[3:])
    assert abs(afresh - second) > 1e-6


@torch.no_grad()
def test_the_transformer_does_not_look_ahead_but_back():
    torch.manual_seed(0)
    model = make_transformer().eval()
    torch.nn.init.normal_(model.embedding.weight)
    words, targets = text()
    losses = [model(words, only(targets, i))[0] for i in range(T)]
    for changed in range(T):
        other = words.clone()
        other[changed] = (other[changed] + 1) % V
        for i, loss in enumerate(losses):
            found, state = model(other, only(targets, i))
            assert state is None
            # later positions go into products of other shapes at most: the same numbers, rounded
            assert (abs(found - loss) < 1e-6) == (i < changed), (i, changed)


@torch.no_grad()
def test_the_transformer_knows_positions():
    torch.manual_seed(0)
    model = make_transformer().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    words, targets = text()
    swapped = words.clone()
    swapped[[0, 1]] = words[[1, 0]]
    before, after = (model(w, only(targets, T - 1))[0] for w in (words, swapped))
    assert abs(before - after) > 1e-6


@torch.no_grad()
def test_the_transformer_normalises_before_each_part_and_at_the_end():
    torch.manual_seed(0)
    model = make_transformer(num_layers=1).eval()
    layer = model.layers[0]
    words, targets = text()
    x = model.embedding(words) + model.positions.weight[:, None]
    y = layer.norm1(x)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = x + layer.self_attn(y, y, y, attn_mask=mask)[0]
    x = x + layer.linear2(functional.gelu(layer.linear1(layer.norm2(x))))
    logits = model.softmax.linear(model.norm(x))
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(model(words, targets)[0], expected)


@pytest.mark.parametrize("make", MODELS)
def test_the_first_loss_is_the_texts_entropy_given_its_counts(make):
    torch.manual_seed(0)
    counts = torch.tensor([2.0 ** -min(k, 9) for k in range(V)]) * 2**9
    frequencies = counts / counts.sum()
    words = torch.multinomial(frequencies, T * 400, True).view(T, 400)
    entropy = float(-(frequencies[words].log()).mean())
    for kind in ("full", "sampled"):
        model = make(kind, word_counts=counts).eval()
        loss = model(words, words)[0].item()
        assert abs(loss - entropy) < 0.2 < 1 < math.log(V) - entropy


@pytest.mark.parametrize("make", MODELS)
def test_dropout_acts_in_training_alone(make):
    torch.manual_seed(0)
    model, batch = make(dropout=0.5), text()
    assert model(*batch)[0] != model(*batch)[0]
    model.eval()
    assert model(*batch)[0] == model(*batch)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_checkpointing_repeats_loss_and_gradients_and_keeps_less(make, kind):
    """To the bit, dropout and samples included."""
    batch = text()
    results, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make(kind, dropout=0.3, sparse_embedding=True, checkpoint_activations=checkpointed)
        with Made() as made:
            loss, _ = model(*batch)
            kept.append(made.kept_bytes(*batch, *model.parameters()))
        loss.backward()
        after = torch.rand(1)  # the generator is left where it was, too
        results.append([loss, after, *(p.grad.to_dense() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_a_step_is_near_the_one_in_float32(make, kind, checkpointed, dtype):
    batch, losses, gradients = text(), [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make(kind, sparse_embedding=True, checkpoint_activations=checkpointed)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss, state = model(*batch)
            if state is not None:
                loss = (loss + model(*batch, state)[0]) / 2
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert abs(losses[0] - losses[1]) < 2**-7 * losses[0]
    assert not torch.equal(*gradients)
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("make", MODELS)
def test_tables_have_row_sparse_gradients_where_asked_for(make):
    softmax = ["softmax.weight.weight", "softmax.bias.weight"]
    assert row_sparse_names(make("full")) == []
    assert row_sparse_names(make("sampled")) == softmax
    model = make("sampled", sparse_embedding=True)
    assert row_sparse_names(model) == ["embedding.weight", *softmax]
    model(*text())[0].backward()
    is_sparse = {name for name, p in model.named_parameters() if p.grad.is_sparse}
    assert is_sparse == {"embedding.weight", *softmax}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["full", "sampled"])
@pytest.mark.parametrize("make", MODELS)
def test_a_step_runs_without_numbers(make, kind, checkpointed):
    options = {"sparse_embedding": True, "checkpoint_activations": checkpointed, "dropout": 0.1}
    with FakeTensorMode():
        model = make(kind, **options)
        loss, state = model(*text())
        model(*text(), state)[0].backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
    with torch.device("meta"):
        model = make(kind, **options)
        loss, _ = model(*text())
        loss.backward()
    assert loss.shape == () and all(p.grad is not None for p in model.parameters())


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "make, kind, rate",
    [(make_lstm, "full", 0.05), *((make_transformer, kind, 0.02) for kind in KINDS)],
)
def test_a_rule_is_learnt(make, kind, rate):
    """The next word is the next in number; 60 is the perplexity of knowing nothing."""
    torch.manual_seed(0)
    model = make(kind)
    rows = row_sparse_names(model)
    named = dict(model.named_parameters())
    optimizers = [torch.optim.Adam([p for n, p in named.items() if n not in rows], rate)]
    if rows:
        optimizers.append(torch.optim.SparseAdam([named[n] for n in rows], rate))
    for _ in range(200):
        words = torch.randint(V, (T, 16))
        model.zero_grad()
        model(words, (words + 1) % V)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    words = torch.arange(V).repeat(T)[: T * (V // T)].view(T, -1)
    loss, _ = model.eval()(words, (words + 1) % V)
    assert math.exp(loss.item()) < 1.5


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: make_lstm(projection_dim=16), "projection_dim is 16; allowed: 1 to 15"),
        (lambda: make_transformer(num_heads=3), "num_heads is 3 for a width of 16"),
        (lambda: make_transformer()(*text(T + 1)), "8 positions; allowed: at most 7"),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        build()
