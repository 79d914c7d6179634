"""Language models in real runs: texts on disk, state that is carried on, rows, shards, a resume."""

import json
import random

import pytest

from benchmarks.tables import read_scalars

pytestmark = pytest.mark.integration
WORDS = [f"w{n}" for n in range(300)]
LSTM = {
    "model__embedding_dim": 16,
    "model__hidden_dim": 16,
    "model__dropout": 0.2,
    "train__optimizer__lr": 0.02,
    "train__batch_size_per_rank": 4,
    "train__eval_batch_size_per_rank": 3,
    "train__num_epochs": 2,
}
ROWS = {"model__softmax": "sampled", "model__num_samples": 50, "model__sparse_embedding": True}


def write_text(path, num_lines, seed):
    """Lines in which half the words follow from the word before; frequencies fall with the rank."""
    rng, lines, word = random.Random(seed), [], 0
    for _ in range(num_lines):
        line = []
        for _ in range(rng.randrange(1, 15)):
            next_word = (7 * word + 1) % 300
            word = next_word if rng.random() < 0.5 else int(300 * rng.random() ** 3)
            line.append(WORDS[word])
        lines.append(" ".join(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def text(tmp_path):
    for seed, split in enumerate(("train", "valid", "test")):
        write_text(tmp_path / "text" / f"{split}.txt", 600 if split == "train" else 60, seed)
    return tmp_path / "text"


@pytest.fixture
def shards(tmp_path):
    for number in range(5):
        write_text(tmp_path / "shards/train" / f"part-{number}", 100 + 30 * number, number)
    write_text(tmp_path / "shards/test" / "part-0", 40, 9)
    return tmp_path / "shards"


def test_a_network_with_row_sparse_gradients_learns_and_can_be_scored(runs, text):
    configs = ["--configs", "configs/text/lstm.py", "configs/optim/sketch_adam_v.py"]
    settings = {**LSTM, **ROWS, "dataset__root": text, "train__optimizer__size_ratio": 0.5}
    runs.succeed(configs=configs, launcher="horovodrun", **settings)
    result = runs.result()
    metrics = result["metrics"]["perplexity/valid"]
    assert metrics["last"] < 150, "300 words by chance; by their frequencies 200"
    assert metrics["best"] == min(metrics.values())
    assert result["payload_bytes_per_step"] < result["dense_bytes_per_step"]
    scored = runs.succeed("--evaluate", configs=configs, **settings)
    assert f"perplexity/valid: {metrics['best']:.4f}" in scored
    write_text(text / "train.txt", 600, seed=7)
    refused = runs.fail(configs=configs, **settings)
    assert "a checkpoint made with other data (then, now)" in refused
    assert "word_counts to train" in refused


@pytest.mark.long
@pytest.mark.parametrize("dgc", [[], ["configs/dgc/wm0.py"]], ids=["dense", "sparse"])
def test_a_killed_run_takes_up_text_and_hidden_state_to_the_bit(runs, text, dgc):
    configs = ["--configs", "configs/text/lstm.py", *dgc]
    settings = {**LSTM, "dataset__root": text, "dataset__bptt": 7, "checkpoint__every_steps": 1,
                "train__micro_batches_per_step": 2}  # fmt: skip
    runs.straight_and_killed(configs=configs, step=7, **settings)


def test_a_killed_run_takes_up_streamed_shards_and_hidden_state_to_the_bit(runs, shards):
    configs = ["--configs", "configs/text/lstm.py", "configs/text/shards.py",
               "configs/optim/sketch_adam.py"]  # fmt: skip
    settings = {**LSTM, **ROWS, "dataset__root": shards, "dataset__bptt": 7,
                "checkpoint__every_steps": 4, "train__num_epochs": 1}  # fmt: skip
    one = runs.straight_and_killed(configs=configs, step=20, **settings)
    assert one["metrics"]["perplexity/test"]["last"] < 280


def test_the_rate_falls_when_the_validation_text_stalls(runs, text):
    configs = ["--configs", "configs/text/lstm.py"]
    still = {**LSTM, "train__num_epochs": 3, "train__optimizer__lr": 1e-7}
    runs.succeed(configs=configs, num_ranks=1, dataset__root=text, **still)
    rates = [value for _, value in read_scalars(runs.folder())["lr"]]
    in_epoch = len(rates) // 3
    expected = [1e-7] * 2 * in_epoch + [0.25e-7] * in_epoch  # the first epoch is the best so far
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
def test_a_masked_language_model_trains_in_16_bits_with_activations_made_again(runs, text):
    configs = ["--configs", "configs/bert/small.py", "configs/optim/parsimony.py"]
    settings = {"dataset__root": text, "model__width": 32, "model__num_layers": 1,
                "model__feedforward": 64, "dataset__sequence_length": 16,
                "model__checkpoint_activations": True, "train__precision": "bfloat16",
                "train__num_epochs": 1, "train__batch_size_per_rank": 8,
                "data__num_workers_per_rank": 0}  # fmt: skip
    runs.succeed(configs=configs, num_ranks=1, **settings)
    result = runs.result()
    assert result["metrics"]["loss/test"]["last"] < 5.8  # guessing among 304: 5.72
    assert result["state_bytes"]["gradients"] == 0


@pytest.mark.long
def test_the_memory_report_foretells_what_the_allocator_gives(runs, text):
    """Rows, a sketch, text that is carried on; a job of two ranks, of which one is looked at."""
    configs = ["--configs", "configs/text/lstm.py", "configs/optim/sketch_adam.py"]
    larger = {"model__embedding_dim": 128, "model__hidden_dim": 128, "dataset__bptt": 20}
    settings = {**LSTM, **ROWS, **larger, "dataset__root": text}
    words = ["--report", "memory", "--memory-gib", "0.25"]
    runs.succeed(*words, configs=configs, **settings)
    told = json.loads((runs.folder() / "memory.json").read_text())
    assert abs(told["peak_error"]) < 0.05
    mine = told["predicted"][0]
    for kind, predicted in (("parameters", "parameters"), ("exp_avg_sq", "state: exp_avg_sq")):
        assert mine["kept"][predicted] > 0, kind
    states = sum(size for kind, size in mine["kept"].items() if kind.startswith("state: "))
    assert states == told["measured"]["kept"]["optimizer"]
    assert mine["kept"]["parameters"] == told["measured"]["kept"]["parameters"]
    assert {row["contender"] for row in told["predicted"]} > {"this run", "Adam", "8-bit Adam"}
    assert told["largest_batch"]["recommended"] > told["largest_batch"]["Adam"] > 4
    assert (runs.folder() / "memory.png").stat().st_size > 10_000
    assert not (runs.folder() / "result.json").exists()
