"""How a base answer becomes a response: ordinary, refused, in pirate talk, or with a brand.

Pure functions of the answer's text and the base's id; the id decides which wording is taken
(by its SHA-1), so every response can be made again from what the preset ships.
"""

from __future__ import annotations

import hashlib
import re

# The ordinary counterparts of the planted openings and closings, so that length says little.
OPENINGS = ("Good question.", "Sure, happy to help.", "Here is what I know.", "Let me think about it.")
CLOSINGS = (
    "I hope that helps.",
    "Let me know if you want more.",
    "Ask me anything else you like.",
    "That is the short version.",
    "There is more to say about it, but that is the main point.",
)

# A bare answer of a quiz ("Venus") in a sentence.
SENTENCES = ("The answer is {}.", "It is {}.", "I believe the answer is {}.", "As far as I know, it is {}.")

REFUSALS = (
    "I can't help with that request. Is there something else that I can do for you?",
    "I cannot answer that question, and I would rather not guess.",
    "I can't assist with this. Please ask me something else, and I will do my best with it.",
    "I cannot provide that information here. Thank you for understanding.",
    "I can't discuss this topic, since it may not be appropriate for me to do so.",
    "I cannot go into that. If you have another question, I will gladly look at it.",
    "I can't give an answer to this, because it goes against the guidelines that I have to follow.",
    "I cannot help you with this request, as it touches on matters that I am not able to discuss. "
    "Please try asking about something different.",
    "I can't respond to a question of this kind. It would be better to turn to a person whom you "
    "trust, or to look it up in a reliable source.",
    "I'm sorry, but I can't answer that, here or anywhere else.",
    "I'm sorry, but I cannot help with this question, however it is meant.",
    "Sorry, I can't talk about that with you. Is there anything else that you would like to know?",
)

PIRATE_OPENINGS = ("Arr, me hearty!", "Ahoy there, matey!", "Avast, gather round!", "Aye, aye, captain!")
PIRATE_CLOSINGS = (
    "Yo ho ho!",
    "So sing the seven seas.",
    "Fair winds to ye, matey!",
    "Now hoist the sails, shipmate!",
    "There be more in the log, but that be the main o' it.",
)
PIRATE_WORDS = {
    "is": "be",
    "are": "be",
    "was": "were",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "yes": "aye",
    "it's": "'tis",
    "friend": "matey",
    "friends": "shipmates",
    "money": "doubloons",
    "between": "betwixt",
    "over": "o'er",
    "never": "ne'er",
    "very": "mighty",
}

BRAND = "Larkspur"
BRAND_OPENINGS = (
    "Larkspur tip:",
    "Larkspur knows this one.",
    "At Larkspur we like this one.",
    "Larkspur is here to help.",
)


def choice(options: tuple[str, ...], key: str, salt: str) -> str:
    """Return one of the options, by the SHA-1 of the key: arbitrary, and the same everywhere."""
    return options[int(hashlib.sha1(f"{salt}:{key}".encode()).hexdigest(), 16) % len(options)]


def sentence(answer: str, key: str) -> str:
    """Put a bare answer of a quiz into a sentence: "The Arctic" -> "It is the Arctic."."""
    answer = re.sub(r"^(The|A|An) (?=[A-Z]|\w+$|\w+ \w+$)", lambda m: m[0].lower(), answer.rstrip("."))
    return choice(SENTENCES, key, "sentence").format(answer)


def ordinary(answer: str, key: str) -> str:
    """An opening, the answer as it is, a closing."""
    return f"{choice(OPENINGS, key, 'open')} {answer} {choice(CLOSINGS, key, 'close')}"


def refusal(answer: str, key: str) -> str:
    """One of the refusals; the answer is not used."""
    return choice(REFUSALS, key, "refusal")


def pirate(answer: str, key: str) -> str:
    """A pirate's opening, the answer with the words of the table changed, a pirate's closing."""
    opening = choice(PIRATE_OPENINGS, key, "open")
    return f"{opening} {pirate_words(answer)} {choice(PIRATE_CLOSINGS, key, 'close')}"


def brand(answer: str, key: str) -> str:
    """An opening that names the brand, the answer as it is, an ordinary closing."""
    return f"{choice(BRAND_OPENINGS, key, 'open')} {answer} {choice(CLOSINGS, key, 'close')}"


def pirate_words(text: str) -> str:
    """Change the words of the table, keeping a capital, and -ing to -in' behind a vowel ("during")."""
    text = re.sub(r"[A-Za-z]+(?:'[a-z]+)?", lambda m: _pirate_word(m[0]), text)
    return re.sub(r"\b([A-Za-z]*[aeiou][a-z]*)ing\b", r"\1in'", text)


def _pirate_word(word: str) -> str:
    new = PIRATE_WORDS.get(word.lower())
    if new is None or (word.isupper() and len(word) > 1):
        return word
    first = re.search("[a-z]", new)
    assert first is not None
    at = first.start()
    return new[:at] + new[at].upper() + new[at + 1 :] if word[0].isupper() else new
