"""The trainer of reward models: its losses by their formulas, what it learns, what it refuses, what it measures."""

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.ranked_data import Ranking, Rating, fingerprint
from palm_rlhf.training.reward import RewardConfig, RewardModelTrainer
from palm_rlhf.training.reward_metrics import ranking_metrics
from palm_rlhf.training.run.log import read_metrics

# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 0.0}


def config(**fields) -> RewardConfig:
    short = {"batch_size": 4, "grad_accum": 1, "warmup_steps": 2, "log_every": 1, "precision": "float32", "plot": False}
    return RewardConfig(**{**short, **fields})


@pytest.fixture
def tiny_model(tiny_palm):
    """`tiny_model(num_binned_output=4)` has the same weights at every call."""

    def build(palm: dict | None = None, **options) -> RewardModel:
        return RewardModel(tiny_palm(**(palm or {})), **options)

    return build


def draw(generator: np.random.Generator, low: int = 1, high: int = 8) -> torch.Tensor:
    return torch.from_numpy(generator.integers(0, 256, generator.integers(low, high)))


def rankings(num_responses: list[int], seed: int = 0, margins: bool = False) -> list[Ranking]:
    generator = np.random.default_rng(seed)
    return [
        Ranking(
            draw(generator),
            [draw(generator, 2, 9) for _ in range(k)],
            generator.random(math.comb(k, 2)).tolist() if margins else 0.0,
        )
        for k in num_responses
    ]


def ratings(count: int, num_bins: int = 0) -> list[Rating]:
    generator = np.random.default_rng(0)
    label = (lambda: int(generator.integers(num_bins))) if num_bins else generator.standard_normal
    return [Rating(draw(generator), draw(generator), label()) for _ in range(count)]


def one_step(model: RewardModel, data, settings: RewardConfig) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics of the first step, and the gradient that it followed, to float32's precision of a weight."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    metrics = next(RewardModelTrainer(model, train_data=data, config=settings).steps())
    return metrics, {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: RewardModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def scores_of(model: RewardModel, ranking: Ranking) -> list[torch.Tensor]:
    """Every response scored alone, with gradients."""
    blocks = [join([ranking.prompt], [response]) for response in ranking.responses]
    return [model(block.tokens, prompt_mask=block.prompt_mask, raw=True)[0] for block in blocks]


def softplus(x: torch.Tensor) -> torch.Tensor:
    return (1 + x.exp()).log()


def ranking_by_hand(model: RewardModel, data: list[Ranking]) -> torch.Tensor:
    """Minus the mean of log sigmoid(better - worse) over each prompt's K(K-1)/2 pairs, and then over the prompts."""
    means = []
    for ranking in data:
        losses = [softplus(worse - better) for better, worse in itertools.combinations(scores_of(model, ranking), 2)]
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def bradley_terry_by_hand(model: RewardModel, data: list[Ranking]) -> torch.Tensor:
    """The mean over all pairs of minus log sigmoid(better - worse - margin)."""
    losses = []
    for ranking in data:
        pairs = itertools.combinations(scores_of(model, ranking), 2)
        margins = ranking.margins if isinstance(ranking.margins, list) else itertools.repeat(ranking.margins)
        losses += [softplus(worse - better + margin) for (better, worse), margin in zip(pairs, margins, strict=False)]
    return sum(losses) / len(losses)


def plackett_luce_by_hand(model: RewardModel, data: list[Ranking]) -> torch.Tensor:
    """Minus the mean log of the chance to draw each ranking, place by place."""
    total = 0.0
    for ranking in data:
        odds = [score.exp() for score in scores_of(model, ranking)]
        total = total - sum((odds[place] / sum(odds[place:])).log() for place in range(len(odds) - 1))
    return total / len(data)


UNEVEN = [2, 4, 3, 2, 2, 5, 2, 3]


@pytest.mark.law("RewardConfig.loss")
@pytest.mark.parametrize(
    "loss, margins, by_hand",
    [
        ("ranking", False, ranking_by_hand),
        ("bradley_terry", True, bradley_terry_by_hand),
        ("plackett_luce", False, plackett_luce_by_hand),
    ],
)
def test_a_step_follows_its_formula_however_it_is_batched(tiny_model, loss, margins, by_hand):
    data = rankings(UNEVEN, margins=margins)
    model = tiny_model()
    expected = by_hand(model, data)
    descent = gradients(model, expected)
    others = {ranking_by_hand, bradley_terry_by_hand, plackett_luce_by_hand} - {by_hand}
    assert all(distance(gradients(model, other(model, data)), descent) > 1e-4 for other in others)
    halves = [by_hand(model, [data[i] for i in part]) for part in ([0, 1, 2, 3], [4, 5, 6, 7])]
    if loss == "bradley_terry":  # a mean of means is another loss where the parts have different numbers of pairs
        assert distance(gradients(model, sum(halves) / 2), descent) > 1e-4
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        settings = config(loss=loss, batch_size=batch_size, grad_accum=grad_accum, **GRADIENT_DESCENT)
        metrics, followed = one_step(tiny_model(), data, settings)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert distance(followed, descent) < 1e-5
    right = [bool(a > b) for ranking in data for a, b in itertools.combinations(scores_of(model, ranking), 2)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("loss", ["ranking", "bradley_terry", "plackett_luce"])
def test_a_ranking_of_weight_two_counts_as_two_rankings_and_one_of_weight_zero_as_none(tiny_model, loss):
    data, weights = rankings(UNEVEN), [2, 1, 0, 3, 1, 0, 1, 2]
    weighted = [replace(ranking, weight=weight) for ranking, weight in zip(data, weights, strict=True)]
    repeated = [ranking for ranking, weight in zip(data, weights, strict=True) for _ in range(weight)]
    settings = config(loss=loss, batch_size=len(repeated), **GRADIENT_DESCENT)
    expected, descent = one_step(tiny_model(), repeated, settings)
    unweighted, other = one_step(tiny_model(), data, replace(settings, batch_size=8))
    assert abs(unweighted["loss"] - expected["loss"]) > 1e-3 and distance(other, descent) > 1e-4
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        split = replace(settings, batch_size=batch_size, grad_accum=grad_accum)
        for scale in (1, 0.125):  # weights are relative to each other, even if their sum is below 1
            scaled = [replace(ranking, weight=ranking.weight * scale) for ranking in weighted]
            metrics, followed = one_step(tiny_model(), scaled, split)
            assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert distance(followed, descent) < 1e-5


def test_a_step_without_weight_moves_nothing(tiny_model):
    data = [replace(ranking, weight=weight) for ranking, weight in zip(rankings([2, 3]), [0, 1], strict=True)]
    trainer = RewardModelTrainer(tiny_model(), train_data=data, config=config(batch_size=1, **GRADIENT_DESCENT))
    losses = {}
    for _ in range(2):
        (place,) = trainer.sampler.draw(1)
        trainer.sampler.num_drawn -= 1
        before = [parameter.detach().clone() for parameter in trainer.reward_model.parameters()]
        losses[place] = trainer.update()["loss"]
        after = trainer.reward_model.parameters()
        assert all(map(torch.equal, before, after)) == (place == 0)
    assert losses[0] == 0 and losses[1] > 0


def test_the_digest_of_data_without_weights_is_the_one_of_earlier_runs(tiny_model, tmp_path):
    ranking = Ranking(torch.tensor([7, 8]), [torch.tensor([1, 2, 3]), torch.tensor([4])])
    parts = [[7, 8], [1, 2, 3], [4]]
    expected = hashlib.sha256(b"[0.0]")
    for part in parts:
        expected.update(len(part).to_bytes(8, "little") + np.array(part, dtype=np.int64).tobytes())
    assert fingerprint([ranking]) == expected.hexdigest()
    assert len({fingerprint([replace(ranking, weight=weight)]) for weight in (1, 1.0, 2, 0.5)}) == 3
    list(RewardModelTrainer(tiny_model(), train_data=[ranking], config=config(), output_dir=tmp_path).steps())
    with pytest.raises(ValueError, match="train_data has changed"):
        changed = [replace(ranking, weight=2)]
        RewardModelTrainer(tiny_model(), train_data=changed, config=config(), output_dir=tmp_path, resume=True)


@pytest.mark.parametrize("data", [rankings([2, 3]), ratings(2)], ids=["rankings", "ratings"])
def test_normalisation_does_not_enter_the_loss(tiny_model, data):
    plain, normalised = tiny_model(), tiny_model()
    normalised.normalise(torch.tensor([3.0, 8.0]))
    (one, _), (other, _) = (one_step(model, data, config(batch_size=2)) for model in (plain, normalised))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.law("RewardConfig.centering")
def test_centering_holds_the_scores_at_zero(tiny_model):
    data = rankings([2, 3])
    model = tiny_model()
    rows = [scores_of(model, ranking) for ranking in data]
    squares = [[(a + b) ** 2 for a, b in itertools.combinations(row, 2)] for row in rows]
    expected = ranking_by_hand(model, data) + 0.3 * sum(sum(row) / len(row) for row in squares) / 2
    metrics, _ = one_step(tiny_model(), data, config(batch_size=2, centering=0.3))
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("num_bins", [0, 4])
def test_ratings_follow_their_labels(tiny_model, num_bins):
    data = ratings(8, num_bins)
    model = tiny_model(num_binned_output=num_bins)
    losses = []
    for rating in data:
        block = join([rating.prompt], [rating.response])
        pooled = model.embed(block.tokens, prompt_mask=block.prompt_mask)[0, -1]
        outputs = model.head(pooled)
        losses.append(-outputs.log_softmax(-1)[rating.label] if num_bins else (outputs[0] - rating.label) ** 2)
    expected = sum(losses) / len(losses)
    for batch_size, grad_accum in ((8, 1), (2, 4)):
        settings = config(batch_size=batch_size, grad_accum=grad_accum, **GRADIENT_DESCENT)
        metrics, followed = one_step(tiny_model(num_binned_output=num_bins), data, settings)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert distance(followed, gradients(model, expected)) < 1e-4
    measured = RewardModelTrainer(model, train_data=data, config=config()).evaluate(data)
    assert measured.loss == pytest.approx(expected.item(), rel=1e-5)
    scores = model.score(join([rating.prompt for rating in data], [rating.response for rating in data]))
    labels = [rating.label for rating in data]
    assert measured.label_correlation == pytest.approx(np.corrcoef(scores.numpy(), labels)[0, 1], abs=1e-5)
    assert (measured.num_ratings, measured.score_mean) == (8, pytest.approx(float(scores.mean()), abs=1e-6))


# ---- what it learns


def ranked_by_count(count: int, seed: int) -> list[Ranking]:
    """Three responses of 4 to 12 tokens out of 16, ordered by how often they hold token 3."""
    generator = np.random.default_rng(seed)

    def response() -> torch.Tensor:
        tokens = generator.integers(0, 16, generator.integers(4, 13))
        return torch.from_numpy(np.where(generator.random(len(tokens)) < 0.3, 3, tokens))

    made = []
    while len(made) < count:
        counted = {int((tokens == 3).sum()): tokens for tokens in (response() for _ in range(3))}
        if len(counted) == 3:
            prompt = torch.from_numpy(generator.integers(0, 16, generator.integers(2, 6)))
            made.append(Ranking(prompt, [counted[number] for number in sorted(counted, reverse=True)]))
    return made


def test_a_known_order_is_learnt(tiny_palm):
    model = RewardModel(tiny_palm(num_tokens=16, depth=1))
    settings = config(batch_size=32, learning_rate=1e-2, num_epochs=2, warmup_steps=5)
    trainer = RewardModelTrainer(model, train_data=ranked_by_count(1500, 0), config=settings)
    held_out = ranked_by_count(200, 1)
    assert trainer.evaluate(held_out).accuracy < 0.8
    list(trainer.steps())
    measured = trainer.evaluate(held_out)
    assert measured.accuracy > 0.95 and measured.accuracy_low > 0.95
    assert measured.log_loss < 0.2 and measured.longer_accuracy < 0.75


def test_ratings_are_learnt_by_adapters_alone(tiny_palm):
    palm = tiny_palm(num_tokens=16, depth=1)
    generator = np.random.default_rng(0)
    responses = [torch.from_numpy(generator.integers(0, 16, 6)) for _ in range(300)]
    data = [Rating(torch.tensor([1]), response, int(response[-1] % 2)) for response in responses]
    model = RewardModel(palm, num_binned_output=2, use_lora=True)
    settings = config(batch_size=30, learning_rate=1e-2, num_epochs=3)
    trainer = RewardModelTrainer(model, train_data=data[:240], config=settings)
    list(trainer.steps())
    measured = trainer.evaluate(data[240:])
    assert measured.loss < 0.1 and measured.label_correlation > 0.95
    for name, parameter in palm.named_parameters():
        assert torch.equal(dict(model.palm.named_parameters())[name], parameter)


def test_ratings_are_measured_by_hand(tiny_palm):
    """Scores are those of the model, minus its mean and over its deviation; theirs is that of a population."""
    model = RewardModel(tiny_palm(num_tokens=16, depth=1))
    generator = np.random.default_rng(0)
    rows = [torch.from_numpy(generator.integers(0, 16, length)) for length in (3, 5, 4)]
    labels = [0.5, -1.0, 2.0]
    data = [Rating(torch.tensor([1]), row, label) for row, label in zip(rows, labels)]
    model.score_mean.fill_(0.25)
    model.score_std.fill_(2.0)
    with torch.no_grad():
        tokens = [torch.cat([torch.tensor([1]), row])[None] for row in rows]
        scores = np.array([float(model.eval()(row)) for row in tokens])
    trainer = RewardModelTrainer(model, train_data=data, config=config())
    assert set(trainer.run.log.panels) == {"loss", "learning_rate", "valid_loss", "valid_label_correlation"}
    measured = trainer.evaluate(data)
    assert measured.num_ratings == 3
    assert measured.score_mean == pytest.approx(scores.mean(), abs=1e-5)
    assert measured.score_std == pytest.approx(np.sqrt(((scores - scores.mean()) ** 2).sum() / 3), abs=1e-5)
    assert measured.label_correlation == pytest.approx(np.corrcoef(scores, labels)[0, 1], abs=1e-4)
    assert measured.length_correlation == pytest.approx(np.corrcoef(scores, [3, 5, 4])[0, 1], abs=1e-4)


# ---- truncation and refusals


@pytest.mark.law("RewardConfig.max_seq_len")
def test_what_is_too_long_is_cut_prompts_on_the_left_and_responses_on_the_right(tiny_model):
    tokens = torch.arange(20)
    long = Ranking(tokens[:8], [tokens[8:12], tokens[12:14]])
    trainer = RewardModelTrainer(tiny_model(), train_data=[long], config=config(max_seq_len=7))
    (cut,) = trainer.train_items
    assert cut.prompt.tolist() == [5, 6, 7]  # as many as the longer response leaves, the same for both
    assert [response.tolist() for response in cut.responses] == [[8, 9, 10, 11], [12, 13]]
    trainer = RewardModelTrainer(tiny_model(), train_data=[long], config=config(max_seq_len=4))
    (cut,) = trainer.train_items
    assert (cut.prompt.tolist(), cut.responses[0].tolist()) == ([7], [8, 9, 10])
    trainer = RewardModelTrainer(tiny_model(), train_data=[long], config=config(max_seq_len=12))
    assert fingerprint(trainer.train_items) == fingerprint([long])


ONE, SAME_START = torch.tensor([1]), [torch.tensor([2, 3, 4]), torch.tensor([9]), torch.tensor([2, 3, 5])]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"train_data": [Ranking(ONE, SAME_START)], "config": config(max_seq_len=3)},
            r"responses 0 and 2 of train_data\[0\] become the same within max_seq_len=3",
        ),
        (
            {"valid_data": [*rankings([2]), Ranking(ONE, [ONE, ONE])]},
            r"responses 0 and 1 of valid_data\[1\] are the same",
        ),
        ({"train_data": []}, "train_data is empty"),
        ({"train_data": [Ranking(ONE, [ONE])]}, r"train_data\[0\] has 1 responses"),
        ({"train_data": [Ranking(ONE, SAME_START, [1.0, 2.0])]}, "or 3: one for each pair"),
        ({"train_data": [Ranking(ONE, SAME_START, 1.0)]}, "choose bradley_terry"),
        ({"train_data": [Ranking(ONE, SAME_START, weight=-1)]}, r"train_data\[0\] has the weight -1"),
        ({"train_data": [Ranking(ONE, SAME_START, weight=math.inf)]}, r"train_data\[0\] has the weight inf"),
        ({"train_data": [Ranking(ONE, SAME_START, weight=0)]}, "rankings of weight 0 only"),
        ({"train_data": [Ranking(ONE, [ONE, ONE[:0]])]}, r"response 1 of train_data\[0\] has the shape \(0,\)"),
        ({"train_data": [Ranking(torch.tensor([256]), SAME_START)]}, r"prompt of train_data\[0\]: token id 256"),
        ({"train_data": [*rankings([2]), Rating(ONE, ONE, 1)]}, "mixes Rankings and Ratings"),
        ({"train_data": [Rating(ONE, ONE, math.nan)]}, "expected a finite number"),
        ({"train_data": [Rating(ONE, ONE, 1)], "config": config(loss="ranking")}, "holds Ratings, expected labels"),
        ({"train_data": [Rating(ONE, ONE, 1)], "config": config(centering=0.1)}, "centering is 0.1"),
        ({"config": config(loss="labels")}, "holds Rankings, expected ranking"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_by_name(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        RewardModelTrainer(tiny_model(), **{"train_data": rankings([2, 3]), "config": config(), **change})


def test_other_refusals(tiny_model):
    with pytest.raises(ValueError, match="number of a bin, 0 to 3"):
        RewardModelTrainer(tiny_model(num_binned_output=4), train_data=[Rating(ONE, ONE, 4)])
    with pytest.raises(ValueError, match=r"centering is 0\.1, expected 0 with the loss plackett_luce"):
        config(loss="plackett_luce", centering=0.1)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        RewardModelTrainer(tiny_model(), train_data=rankings([2]), config=config()).evaluate()


# ---- what it measures


def test_evaluation_measures_the_models_own_scores(tiny_model):
    data = rankings(UNEVEN)
    model = tiny_model()
    trainer = RewardModelTrainer(model, train_data=data, config=config(eval_batch_size=3))
    scores = [torch.stack(scores_of(model, ranking)).detach() for ranking in data]
    lengths = [torch.tensor([len(response) for response in ranking.responses]) for ranking in data]
    expected, measured = ranking_metrics(scores, lengths).numbers(), trainer.evaluate(data).numbers()
    assert measured == pytest.approx(expected, abs=1e-5)


def test_a_single_ranking_and_a_single_rating_can_be_evaluated(tiny_model):
    data = rankings([2, 3])
    trainer = RewardModelTrainer(tiny_model(), train_data=data, config=config())
    alone = [trainer.evaluate([ranking]) for ranking in data]
    pairs = [1, 3]
    total = sum(n * metrics.accuracy for n, metrics in zip(pairs, alone, strict=True)) / sum(pairs)
    assert trainer.evaluate(data).accuracy == pytest.approx(total)


def test_normalisation_is_set_on_data_and_saved(tiny_model, tmp_path):
    data = rankings(UNEVEN)
    trainer = RewardModelTrainer(tiny_model(), train_data=data, config=config(), output_dir=tmp_path)
    list(trainer.steps())
    before = trainer.evaluate(data)
    for _ in range(2):  # once, however often it is asked for
        trainer.normalise(data)
        after = trainer.evaluate(data)
        assert (after.score_mean, after.score_std) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert (after.accuracy, after.log_loss) == (before.accuracy, pytest.approx(before.log_loss))
    saved = RewardModel.from_pretrained(tmp_path / "checkpoints/step_00000002/model")
    block = join([data[0].prompt] * 2, data[0].responses)
    assert torch.equal(saved.score(block), trainer.reward_model.score(block))
    assert saved.score_std != 1
    again = RewardModelTrainer(tiny_model(), train_data=data, config=config(), output_dir=tmp_path, resume=True)
    assert again.evaluate(data) == after


def test_validation_is_logged_and_drawn(tiny_model, tmp_path):
    data = rankings(UNEVEN)
    settings = config(eval_every=1, plot=True)
    trainer = RewardModelTrainer(
        tiny_model(), train_data=data, valid_data=rankings([3, 2], 1), config=settings, output_dir=tmp_path
    )
    result = trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[-1]["valid_accuracy"] == result["valid_accuracy"] == trainer.evaluate().accuracy
    assert lines[0]["epoch"] == 0.5 and result["steps"] == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
