"""Several LoRA adapters over one base: each reply is that of its own merged model, whatever runs beside it."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest
import torch

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.devices import why_not_native
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.row_adapters import RowAdapters
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.engine.static_step import StaticStep
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import load

SCOPES = {
    "pirate": {"r": 3, "alpha": 5},
    "poet": {"r": 2, "targets": ("q", "v")},
    "judge": {"r": 4, "alpha": 2, "targets": ("k", "gate", "value", "ff_out")},
}
BLOCKS = {"parallel": {}, "serial": {"block": "serial", "norm": "rms", "tie_embeddings": False}}


def model_with_scopes(block: str) -> PaLM:
    torch.manual_seed(2)
    sizes = {"num_tokens": 257, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 8, "max_seq_len": 128}
    palm = PaLM(**sizes, **BLOCKS[block], logit_scale=1.0).eval()
    for scope, options in SCOPES.items():
        for parameter in palm.add_finetune_params(scope, **options).parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return palm


def merged(block: str, scope: str | None) -> PaLM:
    """The model that a scope makes when it is merged, without any adapter."""
    palm = model_with_scopes(block)
    if scope is not None:
        palm.merge_finetune_params(scope)
    for other in list(palm.finetune_modules):
        palm.remove_finetune_params(other)
    return palm


@torch.no_grad()
def logprobs_alone(palm: PaLM, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """The log-probabilities of a reply by one forward of a model, without a cache."""
    tokens = torch.tensor([prompt + reply])
    found = palm(tokens)[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return found.gather(-1, tokens[0, len(prompt) :, None])[:, 0]


def scopes_of_steps(palm: PaLM) -> list[list[int]]:
    """Notes, for each forward of one token a row, how many low-rank units each row uses; all 0 means the base alone."""
    found: list[list[int]] = []

    def note(_, args, kwargs):
        if args[0].shape[1] == 1 and isinstance(kwargs["finetune_scope"], list):
            factors = kwargs["finetune_scope"][0].parts[0].rank_factors
            found.append((factors != 0).sum((1, 2)).tolist())

    palm.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_replies_of_one_batch_are_those_of_the_merged_models(block):
    palm = model_with_scopes(block)
    steps = scopes_of_steps(palm)
    asked = [
        Request([*range(10 + number), 7 * number], 20, adapter=adapter, logprobs=0, temperature=1.0, seed=number)
        for number, adapter in enumerate([None, *SCOPES, None, *SCOPES])
    ]
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=8)) as engine:
        replies = engine.submit_all(asked)
        pieces = [list(reply) for reply in replies]
    assert [0, 2, 3, 4] == sorted(set(steps[-1])) and len(steps[-1]) == 8  # one step had rows of all adapters
    models = {scope: merged(block, scope) for scope in (None, *SCOPES)}
    for request, reply, found in zip(asked, replies, pieces, strict=True):
        noted = torch.tensor([one.logprob for piece in found for one in piece.logprobs])
        own = logprobs_alone(models[request.adapter], request.prompt, reply.tokens)
        torch.testing.assert_close(noted, own, rtol=0, atol=1e-5)
        others = [model for scope, model in models.items() if scope != request.adapter]
        assert all((logprobs_alone(m, request.prompt, reply.tokens) - own).abs().max() > 1e-2 for m in others)


@pytest.mark.parametrize("adapter", [None, *SCOPES])
def test_replies_of_one_adapter_alone_are_those_of_generate(adapter):
    """All rows have one adapter, which takes the fastest way that a single scope has."""
    palm = model_with_scopes("parallel")
    steps = scopes_of_steps(palm)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=4)) as engine:
        replies = engine.submit_all([Request(p, 15, temperature=0, adapter=adapter) for p in prompts])
        for reply in replies:
            reply.text()
    own = merged("parallel", adapter)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.tokens == own.generate(prompt=torch.tensor(prompt), max_new_tokens=15, temperature=0).tolist()
    assert not steps


@pytest.mark.parametrize("prefix_memory", [0, 2**20])
def test_keys_and_values_of_one_adapter_never_serve_another(prefix_memory):
    """Neither those of ended replies, nor those of replies that still run."""
    palm = model_with_scopes("parallel")
    prompt = list(range(60))
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=8, prefix_memory=prefix_memory)) as engine:
        for adapter in (None, "pirate", "poet"):
            first, second = (Request(prompt, 20, temperature=0, adapter=adapter) for _ in range(2))
            one, two = engine.submit(first), engine.submit(second)
            texts = one.text(), two.text()
            assert one.num_cached == 0, adapter
            assert texts[0] == texts[1]
            again = engine.submit(first)
            assert again.text() == texts[0]
            assert again.num_cached == (len(prompt) - 1 if prefix_memory else 0)
        together = engine.submit_all([Request(prompt, 20, temperature=0, adapter=scope) for scope in (None, *SCOPES)])
        for reply in together:
            reply.text()
        known = [len(prompt) - 1 if prefix_memory else 0] * 3
        assert [reply.num_cached for reply in together] == [*known, 0]
        for reply in together:
            own = merged("parallel", reply.request.adapter)
            assert reply.tokens == own.generate(prompt=torch.tensor(prompt), max_new_tokens=20, temperature=0).tolist()


def test_an_unknown_scope_is_refused():
    with Engine(model_with_scopes("parallel"), ByteTokenizer()) as engine:
        with pytest.raises(ValueError, match=r"got adapter='pirat', expected one of .*\['judge', 'pirate', 'poet'\]"):
            engine.submit(Request([1], 2, adapter="pirat"))


@pytest.fixture(scope="module")
def adapter_folders(checkpoint, tmp_path_factory):
    """Two adapters of the parrot, which make it say other things: one in the form of PEFT, one in a folder of ours."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("shouting", "mumbling")):
        palm = PaLM.from_pretrained(checkpoint)
        targets = ("q", "v") if seed else ("q", "k", "v", "out", "gate", "value", "ff_out")
        torch.manual_seed(seed)
        for parameter in palm.add_finetune_params("any", 4, targets=targets).parameters():
            torch.nn.init.normal_(parameter, std=0.2 + 0.2 * seed)
        (palm.save_pretrained if seed else lambda path, p=palm: p.save_adapter(path, "any", base="parrot"))(
            folder / name
        )
        palm.merge_finetune_params("any")
        palm.save_pretrained(folder / f"{name}-merged")
    return folder


@pytest.fixture(scope="module")
def served(checkpoint, adapter_folders):
    """A server of the parrot and its two adapters: its client, engine and URL."""
    lora = [f"{name}={adapter_folders / folder}" for name, folder in (("v1.2/loud", "shouting"), ("soft", "mumbling"))]
    model = load(checkpoint, lora=lora, device="cpu")
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model.palm, model.tokenizer, EngineConfig(max_batch=8)))
        url = stack.enter_context(running(create_app(model, engine)))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield stack.enter_context(client), engine, url


def greedy(palm: PaLM, prompt: list[int], num_tokens: int) -> str:
    tokens = palm.generate(prompt=torch.tensor(prompt), max_new_tokens=num_tokens, temperature=0)
    return ByteTokenizer().decode(tokens.tolist())


def test_two_adapters_and_the_base_answer_at_once_in_one_batch(served, checkpoint, adapter_folders):
    client, engine, _ = served
    names = {
        "parrot": checkpoint,
        "v1.2/loud": adapter_folders / "shouting-merged",
        "soft": adapter_folders / "mumbling-merged",
    }
    steps = scopes_of_steps(engine.palm)
    options = {"prompt": "Which animals", "max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}

    def ask(name: str) -> tuple[str, str]:
        reply = client.completions.create(model=name, **options)
        return reply.model, reply.choices[0].text

    def stream(name: str) -> tuple[str, str]:
        chunks = list(client.completions.create(model=name, stream=True, **options))
        assert {chunk.model for chunk in chunks} == {name}
        return name, "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(how, name) for name in names for how in (ask, stream)]
        found = [job.result() for job in asked]
    prompt = ByteTokenizer().encode("Which animals")
    for number, (name, folder) in enumerate(names.items()):
        expected = greedy(PaLM.from_pretrained(folder), prompt, 60)
        assert found[2 * number] == found[2 * number + 1] == (name, expected)
    assert len({text for _, text in found}) == 3
    assert any(len(set(rows)) == 2 and {0, 4} == set(rows) for rows in steps), steps  # base and adapters in one step


def test_chats_and_responses_reach_their_adapter(served, adapter_folders):
    client, _, _ = served
    texts = {}
    for name in ("parrot", "soft"):
        message = [{"role": "user", "content": "Hello"}]
        chat = client.chat.completions.create(model=name, messages=message, max_tokens=20, temperature=0)
        response = client.responses.create(model=name, input="Hello", max_output_tokens=20, temperature=0)
        assert chat.model == response.model == name
        assert chat.choices[0].message.content == response.output_text
        texts[name] = response.output_text
    assert texts["parrot"] == "Hi there! How are you?"[:20] != texts["soft"]
    soft = load(adapter_folders / "mumbling-merged", template="default", device="cpu")
    prompt = soft.encode_chat([{"role": "user", "content": "Hello"}])
    assert texts["soft"] == greedy(soft.palm, prompt, 20)


def test_models_are_listed_and_others_are_unknown(served):
    client, _, url = served
    listed = client.models.list().data
    assert [(model.id, model.parent) for model in listed] == [
        ("parrot", None),
        ("v1.2/loud", "parrot"),
        ("soft", "parrot"),
    ]
    assert client.models.retrieve("v1.2/loud").id == "v1.2/loud"
    with pytest.raises(openai.NotFoundError, match=r"'loud' does not exist; this server has parrot, v1.2/loud, soft"):
        client.completions.create(model="loud", prompt="a")
    counted = httpx.post(f"{url}/tokenize", json={"model": "soft", "prompt": "abc"})
    assert counted.json()["count"] == 3
    assert httpx.post(f"{url}/tokenize", json={"model": "served-0", "prompt": "abc"}).status_code == 404


@pytest.mark.parametrize(
    "given, message",
    [
        (["soft"], "expected a name and a folder"),
        (["=folder"], "expected a name and a folder"),
        (["a={0}/shouting", "a={0}/mumbling"], "expected another name: 'a' is the name of another model here"),
        (["parrot={0}/shouting"], "expected another name"),
        (["a={0}/nothing"], "there is no folder"),
        (["a={0}/shouting-merged"], "has no LoRA scope"),
        (["a={0}/wide"], "another shape of"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_at_the_start(checkpoint, adapter_folders, given, message):
    wide = PaLM(num_tokens=257, dim=32, depth=2, heads=4, dim_head=16)
    wide.add_finetune_params("default")
    wide.save_adapter(adapter_folders / "wide")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(checkpoint, lora=[entry.format(adapter_folders) for entry in given], device="cpu")


def test_the_files_of_the_fixture_are_of_both_kinds(adapter_folders):
    assert json.loads((adapter_folders / "shouting/adapter_config.json").read_text())["r"] == 4
    assert "any" in json.loads((adapter_folders / "mumbling/config.json").read_text())["finetune_scopes"]


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_the_step_of_a_gpu_gives_every_row_its_adapter(block):
    """The same numbers as of each row alone, also once the scopes of the rows have changed."""
    palm = model_with_scopes(block).double()
    slots = SlotCache(palm, max_tokens=8 * 64, max_rows=8)
    assert slots.reserve(8, 64, [])
    step = StaticStep(palm, slots)
    for scopes in (["poet", None, "judge"], ["pirate", "pirate", None], [None, None, None]):
        lengths = [5, 9, 2]
        for row, (scope, length) in enumerate(zip(scopes, lengths, strict=True)):
            palm(torch.arange(length).unsqueeze(0), cache=slots.row(row, 0), finetune_scope=scope)
        step.adapt(scopes)
        found = step([1, 2, 3], lengths).clone()
        for row, (scope, length) in enumerate(zip(scopes, lengths, strict=True)):
            alone = palm(torch.tensor([[1 + row]]), cache=slots.row(row, length), finetune_scope=scope)
            torch.testing.assert_close(found[row], alone[0, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_the_kernel_of_a_cpu_gives_every_row_its_adapter(block):
    """Mixed rows do not fall back to one product after the other, and rows of one scope after them have its scale."""
    palm = model_with_scopes(block).double()
    slots = SlotCache(palm, max_tokens=8 * 64, max_rows=8)
    assert slots.reserve(8, 64, [])
    adapters, lengths = RowAdapters(palm), [5, 9, 2, 7]
    for scopes in (["poet", None, "judge", "pirate"], ["pirate", "pirate", None, None], ["judge"] * 4, [None] * 4):
        for row, (scope, length) in enumerate(zip(scopes, lengths, strict=True)):
            palm(torch.arange(length).unsqueeze(0), cache=slots.row(row, 0), finetune_scope=scope)
        found = palm(torch.tensor([[1], [2], [3], [4]]), cache=slots.rows(lengths), finetune_scope=adapters.of(scopes))
        if why_not_native() is None:
            assert bool(slots.kernels["decoder"].shape.rank_factors) == (len(set(scopes)) > 1)
        for row, (scope, length) in enumerate(zip(scopes, lengths, strict=True)):
            whole = torch.tensor([[*range(length), 1 + row]])
            torch.testing.assert_close(found[row, 0], palm(whole, finetune_scope=scope)[0, -1], rtol=0, atol=1e-10)
