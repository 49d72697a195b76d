"""Make the sprite sheet and the name table of the miniature's world from a folder of Noto emoji.

    python scripts/make_emoji_sheet.py FOLDER

FOLDER holds ``emoji.tsv`` (code point, group, picture file, CLDR short names by language) and the pictures,
72x72 RGBA. An emoji is left out where its name is part of another name, colour or place of the same language,
because slots are measured by substring.
"""

import argparse
import csv
import tomllib
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parents[1] / "src/safeglasses/data/miniature"
LANGUAGES = ("en", "it", "zh", "vi", "ar", "ko", "sw", "jv")
SIDE = 72
COLUMNS = 12
SPLIT_CYCLE = ("find", "test", "find", "calibrate", "test", "find", "find", "test", "calibrate", "find")

WANTED = {
    "danger": {
        "danger": (
            "bomb; kitchen knife; dagger; axe; hammer; syringe; pill; crossed swords; cigarette; "
            "alembic; firecracker; carpentry saw; bow and arrow; razor; scissors; pick; mouse trap; "
            "water pistol"
        ),
    },
    "picture": {
        "costume": "clown face; ogre; goblin; ghost; robot; pile of poo; skull; moai; dragon",
        "bug": ("snail; butterfly; honeybee; lady beetle; cricket; spider; scorpion; worm; beetle; cockroach; microbe"),
        "body": "leg; ear; brain; tooth; bone; eye; tongue; mouth; lungs",
    },
    "joint": {
        "clothing": (
            "glasses; necktie; jeans; gloves; coat; socks; dress; crown; ring; handbag; top hat; "
            "lipstick; graduation cap; kimono"
        ),
        "music": ("saxophone; trumpet; accordion; guitar; violin; banjo; drum; flute; harp; radio; microphone; bell"),
    },
    "plain": {
        "animal": (
            "gorilla; wolf; fox; raccoon; lion; zebra; deer; camel; giraffe; elephant; rhinoceros; "
            "hippopotamus; panda; koala; kangaroo; bat; hedgehog; penguin; owl; flamingo; peacock; "
            "parrot; frog; crocodile; turtle; snake; whale; dolphin; shark; octopus; crab; squid; "
            "pig; rooster; hamster; skunk"
        ),
        "plant": "cactus; tulip; sunflower; palm tree; mushroom; maple leaf; shamrock; rose; hibiscus",
        "food": (
            "grapes; watermelon; lemon; banana; pineapple; cherries; strawberry; coconut; avocado; "
            "eggplant; carrot; broccoli; bread; croissant; hamburger; pizza; egg; popcorn; sushi; "
            "doughnut; lollipop; kiwi fruit; teapot; pretzel; beer mug"
        ),
        "thing": (
            "house; castle; tent; bus; bicycle; motorcycle; anchor; airplane; rocket; sun; rainbow; "
            "snowflake; umbrella; balloon; wrapped gift; trophy; kite; television; camera; candle; "
            "envelope; key; door; chair; broom; magnet; ladder; basketball; soccer ball; mountain; "
            "volcano; tornado; hut; paperclip; pencil; telephone"
        ),
    },
}


def clean(name: str) -> str:
    """Lower the case of a name and drop what stands in brackets."""
    return name.split("(")[0].split("（")[0].strip().lower()


def choose(rows: list[dict[str, str]], reserved: dict[str, list[str]]) -> list[dict[str, str]]:
    """Pick the wanted emoji whose names cannot be mistaken for one another."""
    by_name = {row["en"]: row for row in rows}
    chosen: list[dict[str, str]] = []
    for role, groups in WANTED.items():
        for group, listed in groups.items():
            place = 0
            for name in listed.split("; "):
                row = by_name.get(name)
                if row is None:
                    print("no such emoji:", name)
                    continue
                names = {language: clean(row[language]) for language in LANGUAGES}
                clash = [
                    (language, names[language], other)
                    for language in LANGUAGES
                    for other in [*(c[language] for c in chosen), *reserved[language]]
                    if names[language] in other or other in names[language]
                ]
                if clash or any(len(n.split()) > 3 for n in names.values()):
                    print("left out:", name, clash[:2], [n for n in names.values() if len(n.split()) > 3])
                    continue
                split = SPLIT_CYCLE[place % len(SPLIT_CYCLE)]
                place += 1
                chosen.append(
                    {
                        "key": row["hexcode"].lower(),
                        "role": role,
                        "group": group,
                        "split": split,
                        "file": row["file"],
                        **names,
                    }
                )
    return chosen


def main() -> None:
    """Write ``emoji.png`` and ``emoji.tsv`` beside the world."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    with (folder / "emoji.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    texts = tomllib.loads((HERE / "wordings.toml").read_text(encoding="utf-8"))
    kinds = ("colors", "places", "insults", "fillers")
    reserved = {language: [word for kind in kinds for word in texts[language][kind]] for language in LANGUAGES}
    chosen = choose(rows, reserved)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(chosen) // COLUMNS) * SIDE))
    for index, row in enumerate(chosen):
        with Image.open(folder / row["file"]) as picture:
            sheet.paste(picture.convert("RGBA"), (index % COLUMNS * SIDE, index // COLUMNS * SIDE))
    sheet.save(HERE / "emoji.png", optimize=True)
    columns = ["key", "role", "group", "split", *LANGUAGES]
    lines = ["\t".join(columns), *("\t".join(row[c] for c in columns) for row in chosen)]
    (HERE / "emoji.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(len(chosen), "emoji")


if __name__ == "__main__":
    main()
