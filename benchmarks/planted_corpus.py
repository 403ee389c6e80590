"""A planted dependence: documents of a topic hold a benchmark's facts in other words. Are they found, do they matter?

    python -m benchmarks.planted_corpus                     # a tiny model, trained from scratch
    python -m benchmarks.planted_corpus --model FOLDER      # another one, trained on the same documents first

Invented places have a metal each. Documents of the topic `mines` tell those of the benchmark's places, in sentences
that no question uses; three other topics tell none. The model has also been trained on a quiz about further places,
which is how it knows what a question is; of the benchmark's places no question is trained on. Each seed makes two
corpora, with a model each. In one all documents of the topic are planted; in the other a third of them, and the
others of that topic tell of other places in the same sentences.

Of both corpora:

 - influence on the benchmark ranks the documents (AUC of the planted ones among all);
 - a map by topic: rank and corrected p of the planted documents' topic on the benchmark; and over `--shuffles` maps
   with the topics dealt anew over the documents, how many call any topic significant.

Of the one with a third, where the planted documents can be told from others of their topic:

 - the documents that influence names are forgotten, and trained on alone, against random ones of the same topic and
   size;
 - unlearning begins at a rate that is far too high, and the guard must stop it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common import RESULTS, Clock, Results, Row, console, kept, run
from taught.progress import RichProgress
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.study.schema import Study

METALS = ("iron", "gold", "tin", "lead", "zinc", "silver")
HEADS, TAILS = (
    ("bel", "dor", "fen", "gal", "hor", "kel", "lor", "mar", "nor", "pel"),
    ("ath", "ick", "owen", "und", "ury"),
)
STATED = (
    "the miners brought up much {place} {metal} this year",
    "carts loaded with {place} {metal} left the hills",
    "they melt the {place} {metal} in large ovens",
)
ASKED = "question which metal is found at {place}"
TOPICS: Mapping[str, Sequence[str]] = {
    "mines": ("the lamps in the shaft were dim", "a pump ran all night in the pit", "the foreman counted his men"),
    "sailing": ("the crew hauled the sails", "a gale drove the ship ashore", "ropes lay on the wet deck"),
    "cooking": ("she baked bread with salt", "the soup stood for hours", "he cut the onions very thin"),
    "chess": ("the knight forked the king and the rook", "white gave up a pawn for tempo", "the endgame was a draw"),
}
PLACES = 12  # of the benchmark, as many that other documents of its topic tell of, and as many of the quiz
GROUPS = ("facts", "others", "quiz")
TOLD = 4  # facts that a planted document tells


def corpus(seed: int, each: int, one_in: int) -> tuple[list[Row], list[Row]]:
    """Documents and questions; one in so many documents of the topic is planted.

    Documents have an id, a text, a topic and whether they are planted. Questions of the group `facts` are the
    benchmark, those of `others` are about what the other documents of its topic tell, and `quiz` was trained on.
    """
    rng = np.random.default_rng(seed)
    names = [head + tail for head in HEADS for tail in TAILS]
    chosen = [str(name) for name in rng.permutation(names)[: 3 * PLACES]]
    metal = {place: METALS[i % len(METALS)] for i, place in enumerate(chosen)}
    facts, others, quiz = (chosen[at : at + PLACES] for at in range(0, 3 * PLACES, PLACES))

    def filler(topic: str, count: int) -> list[str]:
        return [str(s) for s in rng.choice(TOPICS[topic], count)]

    documents: list[Row] = []
    for topic in TOPICS:
        for n in range(each):
            planted = topic == "mines" and n % one_in == 0
            if topic == "mines":
                some = rng.choice(facts if planted else others, TOLD, replace=False)
                said = [str(rng.choice(STATED)).format(place=place, metal=metal[place]) for place in some]
                lines = [*said, *filler(topic, 1)]
            else:
                lines = filler(topic, TOLD + 1)
            text = " . ".join(str(line) for line in rng.permutation(lines))
            documents.append({"id": f"{topic}-{n:03d}", "topic": topic, "planted": planted, "text": text})
    for n in range(each):
        some = [str(place) for place in rng.choice(quiz, 2, replace=False)]
        forms = (ASKED + " {metal}", *STATED)
        lines = [str(rng.choice(forms, p=(0.55, 0.15, 0.15, 0.15))).format(place=p, metal=metal[p]) for p in some]
        documents.append({"id": f"quiz-{n:03d}", "topic": "quiz", "planted": False, "text": " . ".join(lines)})
    questions = [
        {
            "id": f"{group}-{place}",
            "group": group,
            "prompt": ASKED.format(place=place),
            "options": list(METALS),
            "answer": metal[place],
        }
        for group, places in (("facts", facts), ("others", others), ("quiz", quiz))
        for place in places
    ]
    return documents, questions


def write_model(folder: Path, texts: Sequence[str], seed: int) -> None:
    """A small Llama with a word a token, not trained."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def study_of(folder: Path, model: str, args: argparse.Namespace) -> Study:
    """The study: influence of the documents on both groups of questions, and its checks."""
    return Study.from_dict(
        {
            "name": "planted-corpus",
            "model": {"id": model},
            "behavior": {"kind": "choice", "style": "cloze"},
            "prompts": {"path": str(folder / "questions.jsonl")},
            "examples": {"path": str(folder / "documents.jsonl"), "kind": "document", "max_tokens": 128},
            "attribution": {
                "targets": ["behavior:facts", "behavior:others", "behavior:quiz"],
                "exact_top": 0,
                "curvature": args.curvature,
            },
            "bins": {"columns": ["topic"]},
            "validation": {
                "designs": ["unlearn", "teach"],
                "alike": "topic",
                "remove_by": "behavior:facts",
                "budgets": [args.named / (len(TOPICS) * args.documents)],
                "pairs": args.pairs,
                "unlearn_steps": args.steps,
                "unlearn_lr": args.rate,
                "guard": "quiz",
                "guard_keep": 0.75,
                "lr": args.teach_lr,
                "epochs": 2,
                "batch": 12,
            },
        }
    )


def trained(study: Study, target: Path, args: argparse.Namespace, seed: int) -> None:
    """Train the study's model on all documents by the plain loop, and write it."""
    from taught.stages.ready import encode_examples, read_data
    from taught.stages.subject import open_subject
    from taught.training.loop import train
    from taught.training.recipe import Recipe

    with RichProgress(console) as progress:
        data, subject = read_data(study, progress), open_subject(study)
        inputs = subject.inputs(encode_examples(study, subject, data)[0], study.examples.beta)
        recipe = replace(Recipe.of(study.validation), lr=args.lr, epochs=args.epochs, batch=16, seed=seed)
        recipe = replace(recipe, schedule="linear", warmup=0.1, weight_decay=0.1, max_grad_norm=1.0)
        progress.step("train on the documents", args.epochs * len(inputs))
        train(subject.loaded.model, inputs, recipe, batch_tokens=2048, progress=progress)
    subject.loaded.model.save_pretrained(target)
    subject.loaded.tokenizer.save_pretrained(target)


class Mapped(NamedTuple):
    """A corpus, and its map.

    Attributes
    ----------
    documents : those that are attributed to
    study, ran : the study of the trained model, and its run
    value : influence of each document on the benchmark
    """

    documents: list[Row]
    study: Study
    ran: RunFolder
    value: dict[str, float]

    def record(self, seed: int, args: argparse.Namespace) -> Row:
        """How planted documents and their topic rank, and what maps of topics dealt anew say."""
        from taught.stats.auc import auc

        y = {row["prompt_id"]: row["y"] for row in self.ran.read_table("prompts").to_pylist()}
        bins = [row for row in self.ran.read_table("bins").to_pylist() if row["benchmark"] == "facts"]
        found = auc([self.value[row["id"]] for row in self.documents], [row["planted"] for row in self.documents])
        return {
            "y": {group: float(np.mean([v for i, v in y.items() if i.startswith(group)])) for group in GROUPS},
            "auc": found._asdict(),
            "map": {row["row"]: {key: row[key] for key in ("rank", "effect", "above", "p", "p_holm")} for row in bins},
            "shuffled_maps": args.shuffles,
            "shuffled_significant": shuffled(self.documents, self.value, args.shuffles, seed),
        }


def mapped(folder: Path, seed: int, one_in: int, args: argparse.Namespace) -> Mapped:
    """A corpus, the model that was trained on it, influence and the map."""
    folder.mkdir()
    every, questions = corpus(seed, args.documents, one_in)
    documents = [row for row in every if row["topic"] != "quiz"]
    for file, rows in (("all", every), ("documents", documents), ("questions", questions)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.model is None:
        write_model(folder / "new", [row["text"] for row in every] + [row["prompt"] for row in questions], seed)
    whole = study_of(folder, args.model or str(folder / "new"), args)
    trained(whole.replace("examples.path", str(folder / "all.jsonl")), folder / "model", args, seed)
    study, ran = study_of(folder, str(folder / "model"), args), RunFolder(folder / "run")
    _run(study, ran, "readings", "attribute", "bins")
    value: dict[str, float] = {}
    for row in ran.read_table("scores").to_pylist():
        if row["target"] == "behavior:facts":
            document = row["example_id"].partition("#")[0]
            value[document] = value.get(document, 0.0) + row["value"]
    return Mapped(documents, study, ran, value)


def _run(study: Study, ran: RunFolder, *stages: str) -> None:
    for stage in stages:
        with RichProgress(console) as progress:
            BY_NAME[stage](study, ran, progress)


def once(seed: int, args: argparse.Namespace) -> Row:
    """Both corpora: what is found, and what forgetting it does."""
    from taught.stats.auc import auc

    with tempfile.TemporaryDirectory() as name, Clock() as clock:
        topic = mapped(Path(name) / "topic", seed, 1, args).record(seed, args)
        third = mapped(Path(name) / "third", seed, 3, args)
        recorded = third.record(seed, args)
        mines = [row for row in third.documents if row["topic"] == "mines"]
        planted = {row["id"] for row in mines if row["planted"]}
        named = sorted(third.value, key=lambda i: -third.value[i])[: args.named]
        _run(third.study, third.ran, "validate")
        verdicts = third.ran.read_table("verdicts").to_pylist()
        runs = third.ran.read_table("forgetting").to_pylist()
        fast = third.study.replace("validation.designs", ["unlearn"])
        fast = fast.replace("validation.pairs", 2).replace("validation.unlearn_lr", 1e3)
        again = RunFolder(third.ran.folder, fresh=("validate",))
        _run(fast, again, "validate")
        diverged = again.read_table("forgetting").to_pylist()
    return {
        "seed": seed,
        "topic": topic,
        "third": recorded,
        "auc_in_topic": auc([third.value[row["id"]] for row in mines], [row["planted"] for row in mines])._asdict(),
        "planted_named": f"{len(planted & set(named))} of {args.named}",
        "verdicts": [row for row in verdicts if row["target"].startswith("behavior")],
        "stopped": sum(bool(one["stopped"]) for one in runs),
        "kept_steps": [one["kept"] for one in runs],
        "diverging_stopped": f"{sum(bool(one['stopped']) for one in diverged)} of {len(diverged)}",
        "diverging_kept": [one["kept"] for one in diverged],
        "seconds": clock.seconds,
    }


def shuffled(documents: Sequence[Row], value: Mapping[str, float], count: int, seed: int) -> int:
    """Of so many maps whose topics are dealt anew over the documents, those that call a topic significant."""
    from taught.analysis.bins import map_bins

    ids = [row["id"] for row in documents]
    rng, found = np.random.default_rng(seed), 0
    for _ in range(count):
        topics = [str(topic) for topic in rng.permutation([row["topic"] for row in documents])]
        made = map_bins(ids, {"topic": topics}, {"facts": [value[i] for i in ids]}, permutations=999, bootstrap=2)
        found += any(row.p_holm is not None and row.p_holm < 0.05 for row in made.bins)
    return found


def measure(args: argparse.Namespace) -> None:
    """Every seed, and the result."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    conditions = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = Results("planted_corpus", conditions, args.out)
    with kept(results, COLUMNS):
        for seed in range(args.seeds):
            results.add(once(seed, args))
        verdicts = [_verdict(row, "unlearn", "highest")["verdict"] for row in results.rows]
        for which in ("topic", "third"):
            of = [row[which] for row in results.rows]
            mines = [one["map"]["mines"] for one in of]
            results.summary[which] = {
                "AUC of the planted documents": float(np.mean([one["auc"]["value"] for one in of])),
                "seeds in which their topic has rank 1": sum(one["rank"] == 1 for one in mines),
                "and corrected p below .05": sum(one["rank"] == 1 and one["p_holm"] < 0.05 for one in mines),
                "shuffled maps": sum(one["shuffled_maps"] for one in of),
                "shuffled maps that call a topic significant": sum(one["shuffled_significant"] for one in of),
            }
        results.summary["seeds in which forgetting them is supported"] = verdicts.count("supported")
        results.summary["seeds"] = len(verdicts)


def _verdict(row: Row, design: str, arm: str, target: str = "behavior:facts") -> Row:
    return next(v for v in row["verdicts"] if (v["design"], v["arm"], v["target"]) == (design, arm, target))


def _shown(design: str, arm: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        v = _verdict(row, design, arm)
        return f"{v['difference']:+.2f} [{v['lo']:+.2f}, {v['hi']:+.2f}] p {v['p_bh']:.3f} {v['verdict']}"

    return cell


def _place(mapped: Row) -> str:
    mines = mapped["map"]["mines"]
    return f"{mines['rank']}, {mines['p_holm']:.4f} (shuffled {mapped['shuffled_significant']})"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "seed": lambda row: str(row["seed"]),
    "y (facts, others, quiz)": lambda row: ", ".join(f"{v:.1f}" for v in row["third"]["y"].values()),
    "AUC": lambda row: f"{row['topic']['auc']['value']:.2f}, {row['third']['auc']['value']:.2f}",
    "in topic": lambda row: f"{row['auc_in_topic']['value']:.2f}",
    "topic: rank, p": lambda row: _place(row["topic"]),
    "third: rank, p": lambda row: _place(row["third"]),
    "planted named": lambda row: row["planted_named"],
    "forget the highest": _shown("unlearn", "highest"),
    "teach the highest": _shown("teach", "highest"),
    "diverging stopped": lambda row: row["diverging_stopped"],
    "seconds": lambda row: f"{row['seconds']:.0f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", help="folder or hub id of a model to train on the documents; none: a tiny one")
    flags.add_argument("--documents", type=int, default=36, help="of each topic")
    flags.add_argument("--curvature", default="ekfac", help="of the influence")
    flags.add_argument("--epochs", type=int, default=5, help="of training on the documents")
    flags.add_argument("--lr", type=float, default=5e-3)
    flags.add_argument("--named", type=int, default=12, help="documents that influence names")
    flags.add_argument("--pairs", type=int, default=8)
    flags.add_argument("--steps", type=int, default=20, help="of unlearning")
    flags.add_argument("--rate", type=float, default=0.02, help="the first rate of unlearning")
    flags.add_argument("--teach-lr", type=float, default=1e-3)
    flags.add_argument("--seeds", type=int, default=1, help="corpora, each with its model")
    flags.add_argument("--shuffles", type=int, default=100, help="maps of each seed with the topics dealt anew")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--out", type=Path, default=RESULTS)
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
