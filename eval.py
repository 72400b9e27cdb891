"""The controlled evaluation: fine-tune where a planted feature goes with a class, discover it, mitigate it, measure (RaVL, section 4).

    python eval.py --protocol=ravl --settings=5 --mitigate=2 --out_dir=out

Each setting is a class and a Cramer's V, strongest first. Every step is a run of train.py or discover.py; what is done already is not
done again, so the same command goes on where it was interrupted.
"""
import csv
import hashlib
import io
import json
import math
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import torch

from data import Complaint, bars, expect, flags, html_table, load_data, load_regions, page, region_truth, revision, run, say, table, write, write_json
from model import group_metrics, load_encoder, region_embeddings, unit

# --- I/O ------------------------------------------------------------------------------------------------------------
out_dir = "out"          # protocol.json, protocol.csv, protocol.html; a folder for each setting
cache_dir = "cache"      # embeddings and pre-trained base models, reused by every run
# --- controlled settings (--protocol=ravl) ---------------------------------------------------------------------------
protocol = "ravl"
family = "digits"        # digits, cutouts, coco:DIR: what the images show
digits = "drawn"         # drawn, or mnist:DIR with MNIST's IDX files
settings = 50            # how many, strongest first: Cramer's V .99 for each class, .95, .9, .8, .7
mitigate = -1            # how many of the valid ones also with every mitigation; -1: the smaller of settings and 10
model = "tiny-conv"
pretrained = ""          # of the base model; empty for tiny and tiny-conv: pre-trained once on uncorrelated images, kept in cache_dir
base_steps = 200         # of that pre-training, stopped long before it is good: a base that knows the classes learns nothing spurious
base_rate = 2e-3
steps = 160              # of fine-tuning and of every mitigation
learning_rate = 2e-3
pairs = 64               # image-caption pairs in a step
regions = "grid:2"
threads = 0              # that decode images; 0 for one per core
seed = 0
# --- end -------------------------------------------------------------------------------------------------------------

STRENGTHS = .99, .95, .9, .8, .7
MITIGATIONS = "finetune", "ravl", "upsampled", "vl_erm", "vl_gdro", "spurious_aware", "jtt", "subg"
FIGURES = "image_overall", "image_worst_group", "region_overall", "region_worst_group"


def main():
    config = flags(globals())
    expect(protocol == "ravl", "protocol", protocol, "ravl")
    controlled_settings(config)


def controlled_settings(config):
    """--protocol=ravl: runs the settings, and writes protocol.json, .csv and .html after each."""
    expect(settings >= 1, "settings", settings, "a whole number from 1")
    started, out = time.time(), Path(out_dir)
    former = json.loads((out / "protocol.json").read_text())["config"] if (out / "protocol.json").is_file() else config
    differ = [k for k in config if k not in ("settings", "mitigate", "threads", "cache_dir", "out_dir") and former.get(k) != config[k]]
    if differ:
        raise Complaint(f"{out / 'protocol.json'}: made with " + ", ".join(f"--{k}={former.get(k)}" for k in differ) + "; give the same flags, or another --out_dir")
    where = digits.partition(":")[2]
    spec = lambda strength, label: f"{family}:{strength:g}:{label}" + (f":{where}" if where else "")
    classes = load_data(spec(0, 0), seed=seed).classes
    chosen = [(v, c) for v in STRENGTHS for c in range(len(classes))][:settings]
    expect(settings <= len(chosen), "settings", settings, f"at most {len(chosen)}") if len(chosen) < settings else None
    most = min(settings, 10) if mitigate < 0 else mitigate
    base, done, mitigated = base_model(spec(0, 0)), [], 0
    for k, (strength, label) in enumerate(chosen):
        at = out / f"settings/{strength:g}-{label}"
        found = one_setting(at, spec(strength, label), strength, label, classes, base, mitigated < most)
        mitigated += bool(found["mitigation"])
        done.append(found)
        tree = dict(config=config, git=revision(), settings=done, summary=summarised(done), seconds=time.time() - started)
        write_json(out / "protocol.json", tree)
        say(f"setting {k + 1}/{len(chosen)}: V {strength:g}, {classes[label]}: gap {found['gap']:.2f}{'' if found['valid'] else ', not valid'}; Precision@10 "
            + (", ".join(f"{m} {v:.1f}" if v is not None else f"{m} -" for m, v in found["precision_at_10"].items()) or "not looked for"))
    write(out / "protocol.csv", as_csv(done))
    write(out / "protocol.html", setting_page(tree, classes))
    for title, header, rows in tables(tree["summary"]):
        say(f"\n{title}\n{table(header, rows)}")
    say(f"\n{out}/protocol.json, protocol.csv and protocol.html written, {time.time() - started:.0f} s")


def script(name, out, **more):
    """Runs train.py or discover.py beside this file, its output into out/log.txt; raises Complaint with its last line."""
    words = [f"--{k}={v}" for k, v in dict(dict(model=model, out_dir=out, cache_dir=cache_dir, threads=threads, seed=seed), **more).items()]
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "log.txt", "w") as log:
        job = subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *words], stdout=log, stderr=subprocess.STDOUT)
    if job.returncode == 130:
        raise KeyboardInterrupt
    if job.returncode:
        last = (Path(out) / "log.txt").read_text().strip().splitlines()[-1:]
        raise Complaint(f"{name} {' '.join(words)} failed: {''.join(last)}")


def base_model(spec):
    """Weights of the base model, pre-trained on uncorrelated images of another seed unless --pretrained names some."""
    if pretrained or model not in ("tiny", "tiny-conv"):
        return pretrained
    words = dict(method="finetune", data=spec, seed=1000 + seed, steps=base_steps, learning_rate=base_rate, pairs=pairs)
    at = Path(cache_dir or out_dir) / f"base-{model}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}"
    if not (at / "weights.safetensors").is_file():
        started = time.time()
        script("train.py", at, pretrained="none", **words)
        say(f"base model pre-trained in {time.time() - started:.0f} s, kept in {at}")
    return str(at / "weights.safetensors")


def one_setting(at, spec, strength, label, classes, base, mitigating):
    """Fine-tunes, discovers if the correlation was learned, mitigates if asked to: the setting's entry in protocol.json."""
    samples = load_data(spec, seed=seed)
    tuned = lambda method, **more: (at / method / "weights.safetensors").is_file() or script(
        "train.py", at / method, method=method, data=spec, pretrained=base, steps=steps, learning_rate=learning_rate, pairs=pairs, **more)
    tuned("finetune")
    first = figures(at / "finetune", samples)
    gap = first["groups"][2 * label + 1] - first["groups"][2 * label]
    found = dict(strength=strength, spurious_class=label, valid=gap >= .2, gap=gap, precision_at_10={}, mitigation={})
    if not found["valid"]:
        return found
    weights = at / "finetune/weights.safetensors"
    if not (at / "discovery/discovery.json").is_file():
        script("discover.py", at / "discovery", data=spec, pretrained=weights, regions=regions, method="all")
    tree = json.loads((at / "discovery/discovery.json").read_text())
    found["precision_at_10"] = {name: m["precision_at_10"] for name, m in tree["methods"].items()}
    if mitigating and any(c["kept"] for c in tree["clusters"]):
        for method in MITIGATIONS:
            tuned(method, **({} if method == "finetune" else dict(discovery=at / "discovery")))
            found["mitigation"][method] = {k: v for k, v in figures(at / method, samples).items() if k in FIGURES}
    return found


def figures(at, samples):
    """What the weights in a folder reach on the uncorrelated test split: the four figures, and groups, image accuracy of class x
    feature [2 C]. Region figures: zero-shot accuracy of the regions that show the class object. Kept in figures.json."""
    path = at / "figures.json"
    if path.is_file():
        return json.loads(path.read_text())
    encoder = load_encoder(model, str(at / "weights.safetensors"))
    test = samples.keep((samples.split == 2).nonzero()[:, 0])
    pictures, _ = load_regions(regions, test.items, encoder.frame)
    z, r = region_embeddings(encoder, pictures, cache="", threads=threads, label=f"{at.parent.name} {at.name}")
    g = encoder.class_embeddings(samples.classes, samples.prompts or ["a photo of a {}."])
    image = torch.arange(len(pictures)).repeat_interleave(torch.tensor([len(p.boxes) for p in pictures]))
    shown = region_truth(pictures, test.shows)[0]
    out = {}
    for name, e, index in (("image", z, torch.arange(len(z))), ("region", r[shown], image[shown])):
        right = (unit(e) @ g.T).argmax(1) == test.y[index]
        m = group_metrics(right, test.y[index], test.place[index], samples.counts(0), len(samples.places))
        out.update({f"{name}_overall": float(right.double().mean()), f"{name}_worst_group": m["worst_group"]})
        if name == "image":
            few = [f"{samples.classes[g['y']]}, {samples.places[g['place']]}: {g['n']}" for g in m["groups"] if g["n"] < 50]
            if few or len(m["groups"]) < 2 * len(samples.classes):
                raise Complaint(f"{samples.name}: test groups with fewer than 50 images ({'; '.join(few) or 'some have none'}); the worst group would be noise")
            out["groups"] = [v["accuracy"] for v in m["groups"]]
    write_json(path, out)
    return out


def mean_interval(values):
    """Mean with its 95 % interval over settings, and their number; what was not found counts as zero."""
    x = torch.tensor([v or 0. for v in values], dtype=torch.double)
    half = 1.96 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else 0.
    return dict(mean=float(x.mean()), low=max(0., float(x.mean()) - half), high=min(1., float(x.mean()) + half), n=len(x))


def summarised(done):
    """Mean Precision@10 by method, over all valid settings and by strength; mitigations' means over settings whose RaVL Precision@10
    exceeds .6 and .8, as in the paper."""
    valid = [s for s in done if s["valid"]]
    methods = list(valid[0]["precision_at_10"]) if valid else []
    strengths = sorted({s["strength"] for s in valid}, reverse=True)
    precision = {m: dict(all=mean_interval([s["precision_at_10"][m] for s in valid]),
                         **{f"{v:g}": mean_interval([s["precision_at_10"][m] for s in valid if s["strength"] == v]) for v in strengths}) for m in methods}
    mitigation = {}
    for least in (.6, .8):
        some = [s["mitigation"] for s in valid if s["mitigation"] and (s["precision_at_10"]["ravl"] or 0) > least]
        mitigation[f"precision_above_{least:g}"] = dict(n=len(some), methods={
            m: {k: sum(s[m][k] for s in some) / len(some) for k in FIGURES} for m in MITIGATIONS} if some else {})
    return dict(settings=len(done), valid=len(valid), precision_at_10=precision, mitigation=mitigation)


def tables(summary):
    """(title, header, rows) of the summary's tables."""
    p = summary["precision_at_10"]
    columns = list(next(iter(p.values()))) if p else []
    show = lambda v: f"{v['mean']:.3f} ({v['low']:.2f} to {v['high']:.2f})"
    out = [(f"Precision@10 over {summary['valid']} valid settings of {summary['settings']}, by Cramer's V, mean and 95 % interval",
            ("method", *columns), [(m, *[show(v[c]) for c in columns]) for m, v in p.items()])]
    for least in (.6, .8):
        part = summary["mitigation"][f"precision_above_{least:g}"]
        out.append((f"Mitigation, mean of {part['n']} settings with Precision@10 > {least:g}", ("method", *FIGURES),
                    [(m, *[v[k] for k in FIGURES]) for m, v in part["methods"].items()]))
    return out


def as_csv(done):
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("strength", "spurious_class", "valid", "gap", "stage", "method", "precision_at_10", *FIGURES))
    for s in done:
        head = (s["strength"], s["spurious_class"], s["valid"], s["gap"])
        rows.writerows([(*head, "discover", m, "" if v is None else v, *[""] * 4) for m, v in s["precision_at_10"].items()] or [(*head, "finetune", "", "", *[""] * 4)])
        rows.writerows((*head, "mitigate", m, "", *[v[k] for k in FIGURES]) for m, v in s["mitigation"].items())
    return text.getvalue()


def setting_page(tree, classes):
    """The HTML page: what was found, how well, what each mitigation reaches, every setting."""
    s = tree["summary"]
    sections = [("Discovery: Precision@10", bars([(m, v["all"]["mean"], (v["all"]["low"], v["all"]["high"]), f"n={v['all']['n']}")
                                                  for m, v in s["precision_at_10"].items()]))]
    part = next((p for p in reversed(s["mitigation"].values()) if p["n"]), None)
    if part:
        sections += [(f"Mitigation: {k.replace('_', ' ')}", bars([(m, v[k], None, f"n={part['n']}") for m, v in part["methods"].items()])) for k in FIGURES]
    sections += [(title, html_table(header, rows)) for title, header, rows in tables(s)]
    sections.append(("Every setting", html_table(("V", "class", "valid", "gap", "RaVL Precision@10"), [
        (f"{v['strength']:g}", classes[v["spurious_class"]], "yes" if v["valid"] else "no", v["gap"], v["precision_at_10"].get("ravl")) for v in tree["settings"]])))
    sections.append(("Flags", "<pre>" + escape("\n".join(f"--{k}={v}" for k, v in tree["config"].items())) + f"\ngit {tree['git']}</pre>"))
    return page("flock: controlled settings", f"{s['valid']} of {s['settings']} settings learned the planted feature ({family}, {digits}, {model}).", sections)


if __name__ == "__main__":
    run(main)
