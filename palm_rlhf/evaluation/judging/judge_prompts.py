"""The prompts for a judge: two answers to compare or one to rate, for any turn of a conversation."""

from collections.abc import Sequence
from typing import Literal

from beartype import beartype

from palm_rlhf.evaluation.judging.answers import Question, Turns

Method = Literal["scores", "evidence", "verdict", "rating"]
Messages = list[dict[str, str]]

CRITERIA = (
    "Weigh how helpful and relevant each answer is to what the user wants, whether its statements are accurate, and "
    "whether it goes into as much detail as the task deserves."
)
FAIRNESS = (
    "Which answer comes first, what the assistants are called and how long an answer is are no reasons for or against "
    "it."
)
SYSTEM = "You are an impartial and careful judge of the answers that AI assistants give to users."
TASKS = {
    "scores": (
        f"{CRITERIA} Give each assistant one score from 1 (worst) to 10 (best). {FAIRNESS}\n\n"
        "The first line of your reply holds nothing but the two scores, that of Assistant 1 and that of Assistant 2, "
        "with a space between them. Explain them from the second line on."
    ),
    "evidence": (
        f"{CRITERIA} {FAIRNESS}\n\n"
        "Begin with your reasons: write down what speaks for and against each answer before you settle on "
        "a score. Then give each assistant one score from 1 (worst) to 10 (best). The last line of your reply holds "
        "nothing but the two scores, that of Assistant 1 and that of Assistant 2, with a space between them."
    ),
    "verdict": (
        f"{CRITERIA} {FAIRNESS}\n\n"
        "Compare the two answers briefly, and then say which one serves the user better. End with exactly one of "
        "these: [[A]] if Assistant 1 is better, [[B]] if Assistant 2 is better, [[C]] if neither is."
    ),
    "rating": (
        f"{CRITERIA}\n\n"
        "Explain your judgment briefly, and then rate the answer from 1 (worst) to 10 (best). End with the rating in "
        "two pairs of brackets, like this: [[5]]"
    ),
}
REFERENCE = "A correct answer is given for comparison: point out where an answer departs from it before you judge."
FOLLOW_UP = "The conversations have several turns. Judge only the answers to the user's last message, in their context."


@beartype
def judge_messages(method: Method, question: Question, replies: Sequence[Turns], turn: int = 1) -> Messages:
    """Return the messages that ask a judge about the answers to `question` up to `turn`.

    Args:
        method: The form of the judgment.
        question: The question.
        replies: The answers in the order to show them: two to compare, or one to rate.
        turn: The turn to judge, from 1.
    """
    names = ["the assistant"] if len(replies) == 1 else [f"Assistant {place}" for place in range(1, len(replies) + 1)]
    parts = []
    if turn == 1:
        parts.append(_block("the user's message", question.turns[0]))
        parts += [_block(f"the answer of {name}", reply[0]) for name, reply in zip(names, replies)]
    else:
        for name, reply in zip(names, replies):
            exchanges = zip(question.turns[:turn], reply)
            conversation = "\n\n".join(f"User: {asked}\n\nAssistant: {answered}" for asked, answered in exchanges)
            parts.append(_block(f"the conversation with {name}", conversation))
    instructions = [FOLLOW_UP] if turn > 1 else []
    if len(question.references) >= turn:
        parts.insert(1 if turn == 1 else 0, _block("a correct answer", question.references[turn - 1]))
        instructions.append(REFERENCE)
    content = "\n\n".join([*parts, *instructions, TASKS[method]])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _block(title: str, text: str) -> str:
    return f"<<< {title} >>>\n{text}\n<<< end of {title} >>>"
