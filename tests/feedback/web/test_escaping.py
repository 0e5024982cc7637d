"""Texts and names of people are shown as they are, on every page, and never become markup."""

import re
from urllib.parse import quote

import pytest
from bs4 import BeautifulSoup
from jinja2 import Environment, nodes

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, KnownModel, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import MessageReview, Task, Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.site import WEB
from palm_rlhf.serving.http.run_server import running
from tests.feedback.visiting import PAGE, enter, join, make_site, routes_of, visit

TEXT = (
    """<xss-probe>'"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>{{7*7}}%(a)s&lt;</xss-probe>"""
)
NAME = """<xss-probe onclick='"x=1>"""
MODEL = "<xss-probe>model"
WRITTEN_IN_PYTHON = {"link.label", "item.obstacle", "win.message"}  # marked by N_(), without any value in them


@pytest.fixture
def site(store):
    """A site in which every text of a person is an attack."""
    site = make_site(store, settings=CollectionSettings(num_model_replies=0))
    root, mallory = join(site, "Root", "admin"), join(site, NAME)
    with store.writing() as session:
        session.add(KnownModel(id="m" * 64, name=MODEL))
        for state in ("growing", "halted_by_moderator", "ready_for_export"):
            tree = Tree(language="en", state=state)
            session.add(tree)
            session.flush()
            session.add(TreeEvent(tree_id=tree.id, state=state, reason=TEXT, person_id=mallory.id))
            prompt = message(session, tree, None, "prompter", mallory)
            for _ in range(2):
                reply = message(session, tree, prompt, "assistant", mallory)
                labels = {"spam": 1.0, "lang_mismatch": 0.0, "not_appropriate": 1.0}
                session.add(MessageReview(message_id=reply.id, person_id=mallory.id, labels=labels))
        asked = {"kind": "rank_replies", "person_id": root.id, "tree_id": tree.id, "message_id": prompt.id}
        replies = [each.id for each in session.query(TreeMessage).filter_by(parent_id=prompt.id)]
        until = utc_now().replace(year=2999)
        session.add(Task(**asked, id="a-task", language="en", shown=replies, expires_at=until))
        asked = {"prompt": [{"role": "user", "content": TEXT}], "model_id": "m" * 64, "sampling": {}}
        asked |= {"prompt_key": prompt_key_of(asked["prompt"]), "purpose": "training"}
        sides = [Answer(text=TEXT + side, **asked) for side in "ab"]
        session.add_all(sides)
        session.flush()
        shown = {"left_id": sides[0].id, "right_id": sides[1].id, "person_id": root.id, "purpose": "training"}
        session.add(ShownComparison(id="a-pair", prompt_key=sides[0].prompt_key, chosen_by="random", **shown))
        session.flush()
        session.add(ComparisonVote(comparison_id="a-pair", person_id=root.id, verdict="left"))
    return site


def message(session, tree, parent, role, person) -> TreeMessage:
    fields = {"tree_id": tree.id, "language": "en", "role": role, "text": TEXT, "person_id": person.id}
    row = TreeMessage(parent_id=parent and parent.id, depth=0 if parent is None else 1, accepted=True, **fields)
    session.add(row)
    session.flush()
    return row


def check(html: str) -> int:
    """Check that no element and no attribute comes from a text; return how often the probe is shown as a text."""
    page = BeautifulSoup(html, "html.parser")
    assert page.find("xss-probe") is None and page.find(["iframe", "object", "embed", "base"]) is None
    for element in page.find_all(True):
        for name, value in element.attrs.items():
            assert not name.startswith("on") and name not in ("style", "srcdoc") and "<" not in name, (name, value)
            if name in ("href", "src", "action", "formaction"):
                assert re.match(r"[/#?]", value) and not value.startswith("//"), value
        assert element.name != "script" or (element.get("src") and not element.get_text().strip())
        assert element.name != "style"
    for hidden in page.find_all("input"):
        hidden.replace_with(hidden.get("value", ""))
    assert "49%(a)" not in page.get_text()
    return page.get_text().count("<xss-probe")


def test_texts_of_people_are_shown_as_they_are_on_every_page(site):
    with visit(site) as browser:
        with site.store.reading() as session:
            trees = [tree.id for tree in session.query(Tree)]
            mallory = session.query(TreeMessage).first().person_id
        enter(browser, root_of(site))
        shown: dict[str, int] = {}
        values = {"task_id": ["a-task"], "comparison_id": ["a-pair"], "tree_id": trees, "person_id": [mallory]}
        for route in routes_of(browser.app):
            names = [each.name for each in route.dependant.path_params]
            if "GET" not in route.methods or route.path in ("/account/data", "/join/{secret}"):
                continue
            for value in values[names[0]] if names else [""]:
                path = route.path.replace(f"{{{names[0]}}}", value) if names else route.path
                reply = browser.page(path)
                assert reply.status_code in (200, 303), path
                shown[route.path] = shown.get(route.path, 0) + check(reply.text)
        seen = {path for path, count in shown.items() if count}
        assert seen >= {"/people", "/people/{person_id}/delete", "/tasks/{task_id}", "/compare/{comparison_id}"}
        assert seen >= {"/moderator/trees/{tree_id}", "/moderator", "/mine"}, shown


def root_of(site) -> Participant:
    with site.store.reading() as session:
        return session.query(Participant).filter_by(name="Root").one()


def test_what_a_request_says_is_no_markup_in_the_reply(site):
    with visit(site) as browser:
        assert check(browser.log_in(TEXT[:40], "x" * 10, next=TEXT).text) > 0
        token = enter(browser, root_of(site))
        echoed = 0
        for route in routes_of(browser.app):
            path = route.path
            for each in route.dependant.path_params:
                path = path.replace(f"{{{each.name}}}", quote(TEXT.replace("/", ""), safe=""))
            query = {each.name: TEXT for each in route.dependant.query_params} | {"lang": TEXT, TEXT: TEXT}
            if "GET" in route.methods:
                replies = [browser.page(path, params=query)]
            elif route.path in ("/logout", "/account/sessions/end"):
                continue
            else:
                fields = {each.name: TEXT for each in route.dependant.body_params} | {"text": TEXT, "only": TEXT}
                replies = [browser.post(path, data={**fields, "token": each}, headers=PAGE) for each in (token, "")]
            for reply in replies:
                assert reply.status_code < 500
                echoed += check(reply.text)
        headers = {**PAGE, "accept-language": "<xss-probe>", "host": "<xss-probe>", "origin": "<xss-probe>"}
        assert check(browser.get("/", headers=headers).text) > 0
        assert check(browser.page("/" + quote(TEXT)).text) == 0
        assert check(browser.put("/", content="x", headers={**PAGE, "content-type": "<xss-probe>"}).text) > 0
        assert echoed > 5


def test_templates_take_only_their_own_texts_for_markup():
    """`_()` returns markup, so a text of somebody must never be its message; nothing else is marked as safe."""
    environment = Environment(extensions=["jinja2.ext.i18n"], autoescape=True)
    templates = sorted((WEB / "templates").glob("*.html"))
    assert len(templates) > 10
    for path in templates:
        tree = environment.parse(path.read_text(encoding="utf-8"))
        assert not [found for found in tree.find_all(nodes.Filter) if found.name in ("safe", "forceescape")], path.name
        assert not list(tree.find_all((nodes.MarkSafe, nodes.ScopedEvalContextModifier))), path.name
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in ("_", "gettext", "ngettext"):
                for argument in call.args[: 2 if call.node.name == "ngettext" else 1]:
                    assert is_own(argument), f"{path.name}:{call.lineno}"
    for path in WEB.glob("*.py"):
        assert not re.search(r"\bMarkup\(|\|safe", path.read_text(encoding="utf-8")), path.name


def is_own(argument) -> bool:
    """Whether a message is written in the template, or is one of `WRITTEN_IN_PYTHON`."""
    if isinstance(argument, nodes.CondExpr):
        return is_own(argument.expr1) and is_own(argument.expr2)
    if isinstance(argument, nodes.Getattr) and isinstance(argument.node, nodes.Name):
        return f"{argument.node.name}.{argument.attr}" in WRITTEN_IN_PYTHON
    return isinstance(argument, nodes.Const)


def test_nothing_of_a_text_runs_in_a_real_browser(site, browser):
    site.is_local = True
    with site.store.writing() as session:
        for person in session.query(Participant):
            person.password_hash = None  # the site is the local person's, who is Root
    with running(create_feedback_app(site)) as url:
        seen = 0
        for path in ("/tasks/a-task", "/compare/a-pair", "/people", "/moderator", "/mine", f"/{quote(TEXT)}"):
            browser.get(url + path)
            assert browser.execute_script("return window.pwned === undefined && document.readyState") == "complete"
            assert browser.execute_script("return document.querySelectorAll('xss-probe, img[src=x]').length") == 0
            seen += browser.execute_script("return document.body.textContent.includes('<xss-probe')")
        assert seen >= 4
