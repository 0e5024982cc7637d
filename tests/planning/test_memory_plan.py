"""The memory that a plan foretells, against what real trainers take on a CPU: every tensor counted while it lives."""

import dataclasses
import gc
import json

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.cli import main
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.planning.live_memory import LiveMemory
from palm_rlhf.planning.memory_plan import plan_memory, resident_parts, traced_phases
from palm_rlhf.planning.model_config import dtype_of_model, name_in_commands
from palm_rlhf.planning.plan_settings import PlanSettings
from palm_rlhf.planning.traced_roles import roles_on_meta
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import Request
from palm_rlhf.training import Ranking, RewardConfig, RewardModelTrainer
from palm_rlhf.training.preference import PreferenceTrainer
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preference
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import Example

BLOCKS = {
    "parallel": {},
    "serial": {"block": "serial", "norm": "rms", "tie_embeddings": False, "ff_inner_dim": 352},
}
ROWS, TOKENS, NEW = 4, 128, 48


def config_of(block, depth=4):
    return PaLMConfig(
        num_tokens=600, dim=128, depth=depth, heads=4, dim_head=32, kv_heads=2, z_loss=0.0, **BLOCKS[block]
    )


def palm_of(config, dtype):
    return PaLM.from_config(config).to(getattr(torch, dtype))


def drawn(size):
    return torch.randint(600, (size,))


def sft_peak(config, dtype, lora_r, checkpointing, precision="float32"):
    palm = palm_of(config, dtype)
    examples = [Example(drawn(TOKENS), torch.ones(TOKENS)) for _ in range(3 * ROWS)]
    settings = SupervisedConfig(
        batch_size=ROWS,
        num_epochs=1,
        lora_r=lora_r,
        gradient_checkpointing=checkpointing,
        precision=precision,
        plot=False,
    )
    trainer = SupervisedTrainer(palm, train_data=examples, config=settings)
    return peak_of_steps(trainer, palm)


def settings_of(kind, checkpointing, precision, **options):
    numbers = {"batch_size": ROWS, "grad_accum": 1, "num_epochs": 1, "plot": False}
    return kind(gradient_checkpointing=checkpointing, precision=precision, **numbers, **options)


def reward_peak(config, dtype, lora_r, checkpointing, precision="float32"):
    lora = {"use_lora": True, "lora_r": lora_r, "share_base": True} if lora_r else {}
    model = RewardModel(palm_of(config, dtype), **lora)
    rankings = [Ranking(drawn(TOKENS - NEW), (drawn(NEW), drawn(NEW))) for _ in range(3 * ROWS)]
    settings = settings_of(RewardConfig, checkpointing, precision)
    return peak_of_steps(RewardModelTrainer(model, train_data=rankings, config=settings), model)


def dpo_peak(config, dtype, lora_r, checkpointing, precision="float32"):
    palm = palm_of(config, dtype)
    pairs = [Preference(drawn(TOKENS - NEW), drawn(NEW), drawn(NEW)) for _ in range(3 * ROWS)]
    settings = settings_of(PreferenceConfig, checkpointing, precision, lora_r=lora_r)
    return peak_of_steps(PreferenceTrainer(palm, train_data=pairs, config=settings), palm)


def serve_peak(config, settings):
    """The bytes at the peak of an engine that is asked for all replies at once, of a whole context each, twice."""
    palm = palm_of(config, settings.dtype).eval()
    if settings.quantize is not None:
        palm.quantize_(settings.quantize)
    scopes = [f"adapter-{number}" for number in range(settings.num_adapters)]
    for scope in scopes:
        palm.add_finetune_params(scope, settings.lora_r)
    sizes = {"context": settings.seq_len, "max_batch": settings.batch_size, "prefix_memory": settings.prefix_memory}
    memory = LiveMemory()

    def count():  # in the thread of the engine, where it computes
        memory.__enter__()
        for tensor in [*palm.parameters(), *palm.buffers()]:
            tensor.view(-1)

    with Engine(palm, ByteTokenizer(), EngineConfig(prefill_chunk=2048, **sizes)) as engine:
        engine.call(count).result()
        for _ in range(2):
            prompts = torch.randint(256, (settings.batch_size, settings.seq_len - 4)).tolist()
            adapters = [*scopes, None] * settings.batch_size
            asked = [Request(prompt, 4, adapter=scope, top_p=0.9) for prompt, scope in zip(prompts, adapters)]
            for reply in engine.submit_all(asked):
                reply.text()
        full = settings.batch_size * settings.seq_len * SlotCache.bytes_per_token(palm)
        assert engine.cache_bytes == full and engine.prefix_bytes > 0.8 * settings.prefix_memory
        engine.call(lambda: memory.__exit__(None, None, None)).result()
    return memory.peak


def ppo_peak(config, dtype, lora_r, share_base, checkpointing):
    palm = palm_of(config, dtype).eval()
    reward = RewardModel(palm, use_lora=lora_r > 0, lora_r=lora_r or 8, share_base=share_base).eval()
    settings = PPOConfig(
        num_steps=2, rollouts_per_step=ROWS, rollout_batch_size=ROWS, minibatch_size=ROWS, max_new_tokens=NEW, epochs=1,
        actor_lora_r=lora_r, share_base=share_base, gradient_checkpointing=checkpointing, plot=False,
    )  # fmt: skip
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward,
        critic=reward,
        prompt_token_ids=torch.randint(600, (ROWS, TOKENS - NEW)),
        config=settings,
    )
    return peak_of_steps(trainer, palm, reward, trainer.actor_critic, trainer.reference.palm)


def peak_of_steps(trainer, *models):
    """The bytes at the peak of a trainer's second step, with the weights that were there before the counting."""
    steps = trainer.steps()
    with LiveMemory() as memory:
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.view(-1)  # an operation, by which the counting sees the tensor
        next(steps)
        gc.collect()
        memory.restart_peak()
        next(steps)
        return memory.peak


@pytest.mark.parametrize("block, dtype", [("parallel", "float32"), ("serial", "bfloat16")])
@pytest.mark.parametrize("lora_r, checkpointing", [(0, False), (8, False), (8, True)])
def test_fine_tuning_takes_what_the_plan_says(block, dtype, lora_r, checkpointing):
    config = config_of(block, depth=2)
    settings = plan_of(dtype, lora_r, checkpointing, "float32")
    plan = plan_memory("sft", config, settings)
    assert plan.total == pytest.approx(sft_peak(config, dtype, lora_r, checkpointing), rel=0.1)


def plan_of(dtype, lora_r, checkpointing, precision):
    return PlanSettings(
        lora_r=lora_r, gradient_checkpointing=checkpointing, dtype=dtype, precision=precision, batch_size=ROWS,
        seq_len=TOKENS, new_tokens=NEW,
    )  # fmt: skip


@pytest.mark.parametrize(
    "task, block, dtype, lora_r, checkpointing, precision",
    [
        ("reward", "parallel", "float32", 0, False, "float32"),
        ("reward", "serial", "bfloat16", 8, True, "float32"),
        ("dpo", "serial", "bfloat16", 0, True, "float32"),  # a copy as reference would be 14% more
        ("dpo", "parallel", "float32", 8, False, "float32"),
        ("sft", "parallel", "float32", 0, False, None),  # bfloat16 autocast, as the commands compute on a GPU
        ("dpo", "serial", "float32", 8, True, None),
    ],
)
def test_training_by_preferences_and_in_bfloat16_takes_what_the_plan_says(
    task, block, dtype, lora_r, checkpointing, precision
):
    config, peak = config_of(block, depth=2), {"sft": sft_peak, "reward": reward_peak, "dpo": dpo_peak}[task]
    plan = plan_memory(task, config, plan_of(dtype, lora_r, checkpointing, precision))
    measured = peak(config, dtype, lora_r, checkpointing, precision or "bf16")
    assert plan.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "block, options",
    [
        ("parallel", {"dtype": "float32"}),
        ("serial", {"dtype": "bfloat16", "quantize": "int8"}),
        ("serial", {"dtype": "float32", "lora_r": 16, "num_adapters": 2}),
    ],
    ids=str,
)
def test_a_server_takes_what_the_plan_says(block, options):
    if "quantize" in options:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")
    config = config_of(block, depth=2)
    per_token = 2 * 2 * 2 * 32 * (4 if options["dtype"] == "float32" else 2)
    settings = PlanSettings(**options, batch_size=ROWS, seq_len=TOKENS, prefix_memory=ROWS * TOKENS * per_token)
    plan = plan_memory("serve", config, settings)
    assert plan.total == pytest.approx(serve_peak(config, settings), rel=0.1)


@pytest.mark.parametrize("block, dtype, checkpointing", [("parallel", "bfloat16", False), ("serial", "float32", True)])
@pytest.mark.parametrize("lora_r, share_base", [(0, False), (8, False), (8, True)])
def test_ppo_takes_what_the_plan_says(block, dtype, lora_r, share_base, checkpointing):
    config = config_of(block, depth=2)
    settings = PlanSettings(
        lora_r=lora_r, share_base=share_base, dtype=dtype, batch_size=ROWS, seq_len=TOKENS, new_tokens=NEW,
        rollout_batch_size=ROWS, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    plan = plan_memory("ppo", config, settings)
    assert plan.total == pytest.approx(ppo_peak(config, dtype, lora_r, share_base, checkpointing), rel=0.1)


def test_a_command_names_what_fits_and_what_does_not(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "palm", **config_of("serial").to_dict()}))
    options = ["--task", "sft", "--batch-size", "4", "--seq-len", "128"]
    main(["plan", str(tmp_path), *options, "--gpu-memory", "80GB", "--lora-r", "0"])
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["fits"] and not numbers["settings"]["gradient_checkpointing"]
    config, weights = config_of("serial"), sum(p.numel() for p in PaLM.from_config(config_of("serial")).parameters())
    parts = {"weights, model": 2 * weights, "optimiser state": 4 * weights}  # bfloat16
    assert numbers["resident"] == parts and numbers["phases"]["update"]["gradients"] == 2 * weights
    assert numbers["total_bytes"] == sum(parts.values()) + sum(numbers["phases"]["update"].values())
    assert config.depth == 4
    main(["plan", str(tmp_path), *options, "--gpu-memory", "2KB"])
    out = capsys.readouterr().out
    assert not json.loads(out.splitlines()[-1])["fits"] and "nothing fits: the smallest setting lacks" in out


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4.5)])
def test_a_server_s_weights_and_cache_by_hand(kind, bits):
    config = config_of("parallel")
    plan = plan_memory("serve", config, PlanSettings(quantize=kind, batch_size=3, seq_len=128, prefix_memory=7))
    matrices = 4 * (128 * (128 + 2 * 64 + 2 * 512) + 128 * 128 + 128 * 512)
    others = 600 * 128 + 5 * 128
    scales = 4 * (128 + 2 * 64 + 2 * 512 + 128 + 128) if kind == "int8" else 0
    assert plan.resident == {
        "weights, model": matrices * bits / 8 + 2 * others + 4 * scales,
        "keys and values, replies": 3 * 128 * 2 * 4 * 2 * 32 * 2,
        "keys and values, ended replies": 7,
    }


@pytest.mark.parametrize("share_base", [False, True])
def test_a_base_in_fewer_bits_is_that_of_the_policy_alone_unless_it_is_shared(share_base):
    """As in `palm-rlhf rlhf`, whose reward model keeps the weights of its folder, and the critic begins as it."""
    config, lora = config_of("serial"), {"lora_r": 8, "share_base": share_base}
    plans = [resident_parts(roles_on_meta("ppo", config, PlanSettings(**lora, quantize=k))) for k in (None, "int8")]
    plain, fewer = ({name: size for name, size in plan.items() if "weights," in name} for plan in plans)
    assert fewer["weights, policy"] < 0.7 * plain["weights, policy"]
    others = {"weights, critic", "weights, reward model"}
    assert {name: fewer[name] for name in others} == {name: plain[name] for name in others}
    assert all((plain[name] > plain["weights, policy"] / 2) != share_base for name in others)


@pytest.mark.parametrize(
    "saved, named, training, serving",
    [
        (torch.float32, {}, "float32", "float32"),
        (torch.bfloat16, {"torch_dtype": "float32"}, "bfloat16", "bfloat16"),  # the weights know better
        (None, {"torch_dtype": "float32"}, "float32", "float32"),
        (None, {"dtype": "float16"}, "bfloat16", "bfloat16"),  # as many bytes
        (None, {}, "bfloat16", "bfloat16"),
    ],
)
def test_the_type_is_that_of_the_saved_weights(tmp_path, saved, named, training, serving):
    if saved is not None:
        palm_of(config_of("serial"), "float32").to(saved).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "palm", **config_of("serial").to_dict(), **named}))
    for source in (tmp_path, tmp_path / "config.json"):
        assert (dtype_of_model(source, "sft"), dtype_of_model(source, "serve")) == (training, serving)
        assert name_in_commands(source) == str(tmp_path)
    assert dtype_of_model("8B", "ppo") == "bfloat16" and name_in_commands("8B") == "MODEL"


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="got quantize=int8 without adapters, expected a lora_r of 1 or more"):
        plan_memory("sft", config_of("parallel"), PlanSettings(quantize="int8"))
    with pytest.raises(ValueError, match="got share_base=True, expected the task ppo and a lora_r"):
        plan_memory("ppo", config_of("parallel"), PlanSettings(share_base=True))
    for task, options in (("serve", {"lora_r": 8}), ("serve", {"num_adapters": 1}), ("sft", {"num_adapters": 1})):
        with pytest.raises(ValueError, match="expected both to serve adapters, and a lora_r alone to train them"):
            plan_memory(task, config_of("parallel"), PlanSettings(**options))
    with pytest.raises(ValueError, match="got precision=bf16 in serving"):
        plan_memory("serve", config_of("parallel"), PlanSettings(precision="bf16"))


@pytest.mark.parametrize("task", ["reward", "ppo"])
def test_an_output_layer_that_computes_nothing_has_no_gradients(task):
    """Of a reward model, and of a critic: a third of all where the vocabulary is large and the model small."""
    config = dataclasses.replace(config_of("serial"), num_tokens=8000, depth=1)
    if task == "reward":
        plan = plan_memory(task, config, plan_of("float32", 0, True, "float32"))
        assert plan.total == pytest.approx(reward_peak(config, "float32", 0, True), rel=0.1)
    roles, weights = roles_on_meta(task, config, PlanSettings(dtype="float32")), PaLM.from_config(config).state_dict()
    output = weights["lm_head.weight"].nbytes
    whole = sum(tensor.nbytes for tensor in weights.values())
    expected = whole - output + (whole if task == "ppo" else 0)
    assert resident_parts(roles)["optimiser state"] == pytest.approx(2 * expected, rel=1e-3)


def test_a_deep_model_is_planned_from_shallow_ones():
    config = dataclasses.replace(config_of("serial"), depth=9)
    settings = PlanSettings(dtype="float32", batch_size=2, seq_len=64)
    plan = plan_memory("sft", config, settings)
    assert plan.total == pytest.approx(
        sum(plan.resident.values())
        + traced_phases("sft", config, settings, has_reward_model=True)["update"], rel=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("task, num_roles", [("sft", 1), ("reward", 1), ("dpo", 1), ("ppo", 3)])
def test_the_adapters_of_a_plan_are_on_the_matrices_asked_for(task, num_roles, capsys, tmp_path):
    """Two matrices of rank 8 for each target of each block; those of policy, critic and reward model in ppo."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "palm", **config_of("serial").to_dict()}))
    words = ["--task", task, "--lora-r", "8", "--seq-len", "16", "--new-tokens", "8", "--batch-size", "2"]
    sizes = {"v": 128 + 64, "ff_out": 352 + 128, "q": 128 + 128, "k": 128 + 64, "out": 128 + 128}
    found = {}
    for targets in (("v", "ff_out"), ("q", "k", "v", "out")):
        main(["plan", str(tmp_path), *words, "--lora-targets", *targets])
        numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert numbers["settings"]["lora_targets"] == [*targets]
        found[targets] = sum(size for name, size in numbers["resident"].items() if name.startswith("adapters"))
    expected = [2 * 4 * 8 * num_roles * sum(sizes[target] for target in targets) for targets in found]
    assert found["v", "ff_out"] - found["q", "k", "v", "out"] == expected[0] - expected[1]


@pytest.mark.parametrize("words", [["--task", "serve"], ["--task", "sft", "--lora-r", "0"]])
def test_targets_without_adapters_are_refused(words):
    with pytest.raises(SystemExit, match="got lora_targets=v without adapters"):
        main(["plan", "8B", *words, "--lora-targets", "v"])


@pytest.mark.parametrize("name, size", [("depth", 10**9), ("num_tokens", 10**18), ("ff_inner_dim", 10**15)])
@pytest.mark.parametrize("of", ["palm", "palm_reward"])
def test_a_model_of_absurd_size_is_refused_at_once(name, size, of, tmp_path):
    palm = {**config_of("serial").to_dict(), name: size}
    values = {"model_type": of, "palm": palm} if of == "palm_reward" else {"model_type": of, **palm}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shown = "inner_dim" if name == "ff_inner_dim" else name
    with pytest.raises(SystemExit, match=rf"config\.json describes a model of {shown}={size}; expected at most 1,000"):
        main(["plan", str(tmp_path), "--task", "sft"])
