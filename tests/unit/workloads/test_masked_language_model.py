import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tests.tolerances import assert_close
from tests.unit.workloads.activations import Made
from workloads.masked_language_model import MaskedLanguageModel

V, B, T = 50, 3, 8


def make(**options):
    shape = {"width": 16, "num_heads": 2, "num_layers": 2, "feedforward": 24, "max_positions": T}
    return MaskedLanguageModel(V, **{**shape, "dropout": 0.0, **options})


def masked(num=3):
    """Return words, and targets of which `num` a text count."""
    words, targets = torch.randint(V, (B, T)), torch.full((B, T), -100)
    for row in targets:
        row[torch.randperm(T)[:num]] = torch.randint(V, (num,))
    return words, targets


def test_as_it_stands_it_has_bert_larges_size():
    with torch.device("meta"):
        model = MaskedLanguageModel()
    assert sum(p.numel() for p in model.parameters()) == 335_174_458


@torch.no_grad()
def test_layers_head_and_loss_are_berts():
    torch.manual_seed(0)
    model = make(num_layers=1).eval()
    layer = model.layers[0]
    words, targets = masked()
    x = model.norm(model.embedding(words) + model.positions.weight + model.types.weight[0])
    x = x.transpose(0, 1)
    x = layer.norm1(x + layer.self_attn(x, x, x)[0])
    x = layer.norm2(x + layer.linear2(functional.gelu(layer.linear1(x)))).transpose(0, 1)
    dense, _, norm = model.transform
    logits = norm(functional.gelu(dense(x))) @ model.embedding.weight.T + model.bias
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(model(words, targets), expected)


@torch.no_grad()
def test_positions_see_what_is_before_and_behind_them():
    torch.manual_seed(0)
    model = make().eval()
    torch.nn.init.normal_(model.embedding.weight)
    words, targets = torch.randint(V, (B, T)), torch.full((B, T), -100)
    targets[:, 4] = 1
    loss = model(words, targets)
    for changed in (0, 7):
        other = words.clone()
        other[:, changed] = (other[:, changed] + 1) % V
        assert abs(model(other, targets) - loss) > 1e-6


@torch.no_grad()
def test_types_count():
    model = make().eval()
    words, targets = masked()
    zeros = torch.zeros_like(words)
    assert model(words, targets) == model(words, targets, zeros) != model(words, targets, zeros + 1)


@pytest.mark.parametrize("num", [3, 5, T, 3 * T])
def test_a_limit_that_holds_all_predictions_changes_neither_loss_nor_gradient(num):
    torch.manual_seed(0)
    model, batch = make(), masked(3)
    batch[1][1] = -100  # a text without any
    gradients = []
    for limit in (None, num):
        model.max_predictions = limit
        model.zero_grad()
        loss = model(*batch)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for limited, unlimited in zip(*gradients, strict=True):
        assert_close(limited, unlimited)


def test_of_more_predictions_than_the_limit_the_first_are_trained_on_and_all_are_evaluated():
    torch.manual_seed(0)
    words, targets = masked(5)
    model = make(max_predictions=2)
    first = torch.where((targets != -100).cumsum(1) <= 2, targets, -100)
    assert_close(model(words, targets), make_unlimited(model)(words, first))
    model.eval()
    assert_close(model(words, targets), make_unlimited(model)(words, targets))


def make_unlimited(model):
    other = make()
    other.load_state_dict(model.state_dict())
    return other


def test_a_limit_saves_the_logits_of_the_others():
    largest = []
    for limit in (None, 2):
        model, batch = make(num_layers=0, max_predictions=limit), masked(2)
        with Made() as made:
            model(*batch)
        largest.append(made.largest)
    assert largest == [B * T * V, 16 * V]  # the larger of B * 2 * V and the weights


@pytest.mark.parametrize("limit", [None, 4])
def test_checkpointing_repeats_loss_and_gradients_and_keeps_less(limit):
    batch, results, kept = masked(), [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make(dropout=0.3, max_predictions=limit, checkpoint_activations=checkpointed)
        with Made() as made:
            loss = model(*batch)
            kept.append(made.kept_bytes(*batch, *model.parameters()))
        loss.backward()
        results.append([loss, torch.rand(1), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_under_autocast_a_step_is_near_the_one_in_float32(checkpointed):
    batch, losses, gradients = masked(), [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make(max_predictions=4, checkpoint_activations=checkpointed)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(*batch))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert 0 < abs(losses[0] - losses[1]) < 2**-7 * losses[0]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("options", [{}, {"max_predictions": 2, "checkpoint_activations": True}])
def test_a_step_runs_without_numbers(options):
    with FakeTensorMode():
        model = make(**options)
        model(torch.randint(V, (B, T)), torch.randint(V, (B, T))).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
    with torch.device("meta"):
        loss = make(**options)(torch.randint(V, (B, T)), torch.randint(V, (B, T)))
        loss.backward()
    assert loss.shape == ()


def test_masked_words_are_learnt_from_both_sides():
    """A masked word (word 0) is the one before it early in a text, the one behind it later."""
    torch.manual_seed(0)
    model = make(max_predictions=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def batch():
        words = torch.randint(1, 9, (64, T))
        targets = torch.full((64, T), -100)
        for place, source in ((2, 1), (5, 6)):
            targets[:, place] = words[:, source]
            words[:, place] = 0
        return words, targets

    for _ in range(200):
        optimizer.zero_grad()
        model(*batch()).backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(*batch()) < 0.2  # log(8) is 2.1


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: make(num_heads=3), "num_heads is 3 for a width of 16"),
        (lambda: make(max_predictions=0), "max_predictions is 0; allowed: 1 or more"),
        (lambda: make(max_positions=7)(*masked()), "8 positions; allowed: at most 7"),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        build()
