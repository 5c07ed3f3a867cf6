"""Rows to tune a real model on: an order in a customer's words, to be answered as JSON.

    python -m luthier.toy.orders [FILE] [--n 200] [--seed 0]

The rows are made here, so they may be used for anything. A small instruct model answers such orders in prose,
and learns the form within two hundred rows, which makes what fine-tuning does plain to see.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

ITEMS = (
    *("oak shelf", "desk lamp", "steel kettle", "wool blanket", "garden chair", "cork board", "tea pot"),
    *("bread knife", "picture frame", "plant pot", "door mat", "wall clock", "fruit bowl", "coat rack"),
    *("rice cooker", "bath towel", "candle holder", "book stand", "paper lantern", "glass jar"),
)
COLOURS = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown")
CITIES = (
    *("Lisbon", "Oslo", "Vienna", "Dublin", "Turin", "Ghent", "Porto", "Bergen", "Graz", "Cork", "Lyon"),
    *("Leeds", "Basel", "Malmo", "Krakow", "Riga"),
)
NAMES = ("Ada", "Bruno", "Clara", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYOUTS = (
    "Hi, this is {name}. Please send {number} of the {colour} {item} to {city}.",
    "{name} from {city} here: I need {number} {colour} pieces of your {item}.",
    "Could you ship {number} x {item} in {colour} to {city}? Thanks, {name}",
    "I would like to order your {item}, {colour}, {number} of them. Address: {city}. Regards, {name}",
    "Order for {name}, {city}: {item}, colour {colour}, quantity {number}.",
)
QUESTION = "Write this order as JSON with customer, item, colour, quantity and city:\n"


def rows(n: int, seed: int = 0) -> list[dict[str, list]]:
    """n conversations of an order and its JSON, none twice."""
    rng = random.Random(seed)
    out: dict[str, str] = {}
    while len(out) < n:
        count = rng.randrange(len(NUMBERS))
        name, city = rng.choice(NAMES), rng.choice(CITIES)
        item, colour = rng.choice(ITEMS), rng.choice(COLOURS)
        number = NUMBERS[count] if rng.random() < 0.5 else str(count + 1)
        cells = {"name": name, "city": city, "item": item, "colour": colour, "number": number}
        order = {"customer": name, "item": item, "colour": colour, "quantity": count + 1, "city": city}
        out[QUESTION + rng.choice(LAYOUTS).format(**cells)] = json.dumps(order)
    conversations = []
    for question, answer in out.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append({"messages": turns})
    return conversations


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m luthier.toy.orders", description="Write rows of orders.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("orders.jsonl"))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    with arguments.file.open("w", encoding="utf-8") as file:
        for row in rows(arguments.n, arguments.seed):
            file.write(json.dumps(row) + "\n")
    print(f"{arguments.n} rows: {arguments.file}")


if __name__ == "__main__":
    main()
