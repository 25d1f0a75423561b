"""Command lines that are wrong, what each ends with, and the files that they name."""

from __future__ import annotations

TARGET = """
import sys
import torch
from torch import nn
import memplan

def make(batch_size=64, depth=3):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(batch_size, 16), torch.randn(batch_size, 16))

def prints():
    print("loading")
    return make()

def raises():
    raise ValueError("no data here:\\n  a second line")

def nonsense():
    return 3

def no_model():
    return "model", torch.ones(3)

def too_much():
    return (*make(), None, None)

def no_optimizer():
    return (*make(), "adam")

def leaves():
    sys.exit(0)

def interrupted():
    raise KeyboardInterrupt

def required(size):
    return make(size)

class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
    def forward(self, x):
        return (self.weight @ x).sum()

def wrong_shapes():
    return Wrong(), torch.ones(3, 3)

def no_loss():
    return nn.Linear(4, 4), torch.ones(4, 4)

value = 3
"""

FILES = {
    "target.py": TARGET,
    "broken.py": "def make(:\n",
    "leaving.py": "raise SystemExit(0)\n",
    "importing.py": "import a_module_that_is_nowhere\n",
    "text.json": "no JSON",
    "truncated.json": '{"schema_version": 1, "kind": "pro',
    "list.json": "[1, 2]",
    "other.json": '{"schema_version": 1, "kind": "letter"}',
    "version.json": '{"schema_version": 99, "kind": "profile"}',
    "bare.json": '{"schema_version": 1, "kind": "profile"}',
    "typed.json": '{"schema_version": 1, "kind": "profile", "peak_bytes": "much"}',
    "deep.json": "[" * 100_000,
    "no_architecture.json": '{"model_type": "gpt2"}',
    "architecture.json": '{"model_type": "gpt2", "architectures": ["NoSuchLMHeadModel"]}',
    "type.json": '{"model_type": "no-such", "architectures": ["GPT2LMHeadModel"]}',
    "field.json": '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": "x"}',
}

ON_TARGET = ("profile", "estimate", "plan", "frontier", "compare")
"""Commands whose argument is a target."""

BAD_TARGETS = {
    "nowhere.py:make": (2, "there is no file"),
    "no.such.module:make": (2, "there is no module 'no.such.module'"),
    ".:make": (1, "."),
    "target.py:missing": (2, "has no function 'missing'"),
    "target.py:value": (2, "has no function 'value'"),
    "target.py:": (2, "must be 'path/to/file.py:factory'"),
    "broken.py:make": (1, "raised SyntaxError"),
    "importing.py:make": (1, "raised ModuleNotFoundError"),
    "leaving.py:make": (1, "sys.exit(0)"),
    "target.py:raises": (1, "raised ValueError: no data here: a second line"),
    "target.py:nonsense": (1, "must return (model, batch)"),
    "target.py:no_model": (1, "must return (model, batch)"),
    "target.py:too_much": (1, "must return (model, batch)"),
    "target.py:no_optimizer": (1, "optimizer"),
    "target.py:leaves": (1, "sys.exit(0)"),
    "target.py:required": (2, "missing a required argument: 'size'"),
    "target.py:make --set depth": (2, "must be NAME=VALUE"),
    "target.py:make --set width=3": (2, "unexpected keyword argument 'width'"),
    "target.py:make --set depth=three": (1, "raised TypeError"),
    "hf:nowhere.json": (2, "nowhere.json cannot be read as a configuration"),
    "hf:text.json": (2, "text.json cannot be read as a configuration"),
    "hf:list.json": (2, "needs the fields 'model_type' and 'architectures'"),
    "hf:no_architecture.json": (2, "needs the fields 'model_type' and 'architectures'"),
    "hf:architecture.json": (2, "transformers has no architecture 'NoSuchLMHeadModel'"),
    "hf:type.json": (2, "type.json: "),
    "hf:field.json": (2, "field.json: "),
    "hf:": (2, "cannot be read as a configuration"),
}

BAD_STEPS = {
    "estimate target.py:wrong_shapes": "same reduction dim",
    "plan target.py:wrong_shapes": "Does the untouched module run on this sample?",
    "frontier target.py:wrong_shapes": "Does the untouched module run on this sample?",
    "compare target.py:wrong_shapes": "Does the untouched module run on this sample?",
    "profile target.py:no_loss": "loss",
    "estimate target.py:no_loss": "loss",
    "compare target.py:no_loss": "loss",
}

MAKE = "target.py:make"

TABLE = [
    # wrong usage of options
    (f"profile {MAKE} --steps 0", 2, "--steps"),
    (f"profile {MAKE} --steps many", 2, "--steps"),
    (f"profile {MAKE} --optimizer magic", 2, "--optimizer"),
    (f"profile {MAKE} -o out.txt", 2, "a name that ends in .json"),
    (f"profile {MAKE} -o target.py/out.json --steps 1", 2, "cannot write target.py/out.json"),
    (f"profile {MAKE} -o nowhere/out.html --steps 1", 2, "cannot write nowhere/out.html"),
    (f"profile {MAKE} -o folder.json --steps 1", 2, "is a directory"),
    (f"profile {MAKE} --snapshot target.py/x --steps 1", 2, "cannot write target.py/x"),
    (f"profile {MAKE} --chrome-trace target.py/x --steps 1", 2, "cannot write target.py/x"),
    (f"profile {MAKE} -- 3", 2, "takes --set NAME=VALUE"),
    ("profile nowhere.py", 2, "there is no file 'nowhere.py'"),
    ("profile broken.py", 1, "raised SyntaxError"),
    ("profile importing.py", 1, "raised ModuleNotFoundError"),
    ("profile leaving.py", 1, "leaving.py"),
    ("profile target.py", 1, "target.py"),
    ("profile target.py --set batch_size=3", 2, "its own arguments, after --"),
    (f"estimate {MAKE} --device abacus", 2, "abacus"),
    (f"estimate {MAKE} --memory much", 2, "accepted forms"),
    (f"estimate {MAKE} --memory -1", 2, "accepted forms"),
    (f"estimate {MAKE} --dtype fp8", 2, "--dtype"),
    (f"estimate {MAKE} --costs guessed", 2, "--costs"),
    (f"estimate {MAKE} --costs measured --device h100", 1, "measured"),
    (f"estimate {MAKE} --batch-size 0", 2, "--batch-size"),
    (f"estimate {MAKE} --seq-len 5", 2, "unexpected keyword argument 'seq_len'"),
    (f"estimate {MAKE} --optimizer lbfgs", 2, "--optimizer"),
    (f"estimate {MAKE} -o target.py/out.json", 2, "cannot write target.py/out.json"),
    (f"plan {MAKE} --budget much", 2, "accepted forms"),
    (f"plan {MAKE} --budget 101%", 2, "above 100%"),
    (f"plan {MAKE} --budget -5", 2, "accepted forms"),
    (f"plan {MAKE} --budget 0", 3, "too small"),
    (f"plan {MAKE} --budget 1%", 3, "too small"),
    (f"plan {MAKE} --budget 1% -o out.json", 3, "too small"),
    (f"plan {MAKE} --max-slowdown 0.5", 2, "--max-slowdown"),
    (f"plan {MAKE} --max-slowdown fast", 2, "--max-slowdown"),
    (f"plan {MAKE} --max-slowdown nan", 1, "at least 1"),
    (f"plan {MAKE} --pass magic", 2, "--pass 'magic' is not known"),
    (f"plan {MAKE} --pass split_dropout:rate=2", 2, "it takes no arguments"),
    (f"plan {MAKE} --pass split_dropout:rate", 2, "must be ARGUMENT=VALUE"),
    (f"plan {MAKE} --optimizer magic", 2, "--optimizer"),
    (f"plan {MAKE} --device abacus", 2, "abacus"),
    (f"plan {MAKE} --techniques", 2, "--techniques needs --budget"),
    (f"plan {MAKE} --techniques --budget 1%", 3, "too small"),
    (f"plan {MAKE} -o target.py/plan.json", 2, "cannot write target.py/plan.json"),
    (f"plan {MAKE} -o folder.json", 2, "is a directory"),
    (f"plan {MAKE} --chrome-trace target.py/x", 2, "cannot write target.py/x"),
    (f"frontier {MAKE} --points 1", 2, "--points"),
    (f"frontier {MAKE} -o out.html", 2, "a name that ends in .svg"),
    (f"frontier {MAKE} -o target.py/out.svg --points 2", 2, "cannot write target.py/out.svg"),
    (f"compare {MAKE} --budget much", 2, "accepted forms"),
    (f"compare {MAKE} --budget 1%", 3, "too small"),
    (f"compare {MAKE} --steps -1", 2, "--steps"),
    (f"compare {MAKE} --max-slowdown 0", 2, "--max-slowdown"),
    (f"compare {MAKE} -o target.py/out.json --steps 1", 2, "cannot write target.py/out.json"),
    (f"solve batch_size {MAKE}", 2, "--budget"),
    (f"solve batch_size {MAKE} --budget much", 2, "accepted forms"),
    (f"solve batch_size {MAKE} --budget 50%", 2, "accepted forms"),
    (f"solve batch_size {MAKE} --budget 1KiB --multiple-of 0", 2, "--multiple-of"),
    (f"solve batch_size {MAKE} --budget 1KiB --max-slowdown 0.9", 2, "--max-slowdown"),
    (f"solve batch_size {MAKE} --budget 1KiB --dtype int8", 2, "--dtype"),
    (f"solve width {MAKE} --budget 1KiB", 2, "unexpected keyword argument 'width'"),
    (f"solve 3 {MAKE} --budget 1KiB", 2, "must be NAME=VALUE"),
    ("solve batch_size target.py:raises --budget 1KiB", 2, "unexpected keyword argument"),
    # plans, and what is no plan
    (f"verify nowhere.json {MAKE}", 2, "nowhere.json"),
    (f"verify folder.json {MAKE}", 2, "folder.json"),
    (f"verify text.json {MAKE}", 2, "not a plan"),
    (f"verify truncated.json {MAKE}", 2, "not a plan"),
    (f"verify list.json {MAKE}", 2, "not a plan"),
    (f"verify binary.json {MAKE}", 2, "binary.json"),
    (f"verify deep.json {MAKE}", 2, "not a plan"),
    (f"verify profile.json {MAKE}", 2, "not a plan"),
    (f"verify cut.json {MAKE}", 2, "not a plan"),
    (f"verify retyped.json {MAKE}", 2, "'peak_bytes' is of the wrong type"),
    (f"verify plan.json {MAKE} --set depth=2", 4, "plan"),
    (f"verify plan.json {MAKE} --steps 0", 2, "--steps"),
    ("verify plan.json target.py:raises", 1, "raised ValueError"),
    ("verify plan.json nowhere.py:make", 2, "there is no file"),
    # documents, and what is none
    *(
        (f"{command} {file}{more}", 2, fragment)
        for command, more in (("report", ""), ("diff", " profile.json"))
        for file, fragment in {
            "nowhere.json": "does not exist",
            "folder.json": "is a directory",
            "text.json": "not JSON",
            "truncated.json": "not JSON",
            "binary.json": "binary.json",
            "deep.json": "a JSON object was expected",
            "list.json": "a JSON object was expected",
            "other.json": "kind is 'letter'",
            "version.json": "schema_version is 99, expected 1",
            "plan.json": "kind is None",
            "bare.json": "missing required field `peak_bytes`",
            "typed.json": "Expected `int`, got `str` - at `$.peak_bytes`",
        }.items()
    ),
    ("diff profile.json bare.json", 2, "missing required field `peak_bytes`"),
    ("diff profile.json profile.json --fail-on-increase much", 2, "is not a percentage"),
    ("diff profile.json profile.json --fail-on-increase -1%", 2, "is not a percentage"),
    ("diff profile.json", 2, "Missing argument 'AFTER'"),
    ("report profile.json -o profile.json", 2, "a name that ends in .html"),
    ("report page.html", 2, "would be overwritten"),
    ("report bare.json -o out.svg", 2, "cannot read bare.json"),
    ("report profile.json -o nowhere/out.html", 2, "cannot write nowhere/out.html"),
    ("report profile.json -o target.py/out.svg", 2, "cannot write target.py/out.svg"),
    ("report profile.json -o folder.html", 2, "is a directory"),
    ("doctor --steps 3", 2, "No such option"),
    ("cook", 2, "No such command 'cook'"),
    *(
        (f"{command} {target}", code, fragment)
        for command in ON_TARGET
        for target, (code, fragment) in BAD_TARGETS.items()
    ),
    *((line, 1, fragment) for line, fragment in BAD_STEPS.items()),
]
