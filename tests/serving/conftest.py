"""A small model that has learnt some dialogues by heart, and servers of it on the loopback interface."""

from contextlib import ExitStack

import openai
import pytest
import torch

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import load

DIALOGUES = {
    "Hello": "Hi there! How are you?",
    "Count to ten.": "1 2 3 4 5 6 7 8 9 10",
    "Tell me of Crème brûlée": "It is a dessert: sucré, doré, crémeux.",
    "Which animals are there?": "🐈 and 🐕, 🐎 and 🐄.",
    "What is the capital of France?": "It is Paris, on the Seine.",
    "Write a long line": "abcdefghijklmnopqrstuvwxyz" * 3,
}


@pytest.fixture(scope="session")
def dialogues() -> dict[str, str]:
    """What users say, and what the model answers."""
    return DIALOGUES


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with the model, its tokenizer and its template."""
    torch.manual_seed(0)
    tokenizer, template = ByteTokenizer(), PRESETS["default"]
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=64, depth=2, heads=4, dim_head=16, max_seq_len=256)
    examples = [
        encode([{"role": "user", "content": said}, {"role": "assistant", "content": reply}], tokenizer, template)
        for said, reply in DIALOGUES.items()
    ]
    tokens = torch.nn.utils.rnn.pad_sequence([example.tokens.long() for example in examples], batch_first=True)
    loss_mask = torch.nn.utils.rnn.pad_sequence([example.weights > 0 for example in examples], batch_first=True)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(300):
        loss = palm(tokens, return_loss=True, loss_mask=loss_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.05:
            break
    folder = tmp_path_factory.mktemp("serving") / "parrot"
    for part in (palm, tokenizer, template):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(checkpoint, tmp_path_factory):
    """A reward model that has never been trained: its scores differ, and mean nothing."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward") / "judge"
    RewardModel(PaLM.from_pretrained(checkpoint)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served_model(checkpoint, reward_folder):
    """The model with all that belongs to it."""
    return load(checkpoint, reward_model=reward_folder, device="cpu")


@pytest.fixture
def start_engine(served_model):
    """Starts engines of the model, or of another, which are closed at the end."""
    with ExitStack() as stack:

        def start(palm=None, tokenizer=None, **config) -> Engine:
            engine = Engine(palm or served_model.palm, tokenizer or served_model.tokenizer, EngineConfig(**config))
            return stack.enter_context(engine)

        yield start


@pytest.fixture
def start_server(served_model, start_engine):
    """Starts servers, and gives their URL and engine."""
    with ExitStack() as stack:

        def start(what=None, *, api_keys=(), limits=None, access=None, connections=None, **config):
            what = what or served_model
            engine = start_engine(what.palm, what.tokenizer, **config)
            app = create_app(what, engine, api_keys=api_keys, limits=limits, access=access)
            return stack.enter_context(running(app, connections=connections)), engine

        yield start


@pytest.fixture(scope="module")
def server(served_model):
    """One server for the tests of a file, as its URL and engine."""
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(max_batch=4)) as engine:
        with running(create_app(served_model, engine)) as url:
            yield url, engine


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own client of that server; it does not try again."""
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
