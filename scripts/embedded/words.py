"""The word lists that the text generator draws from.

Every list is a tuple of phrases that fit one slot of a sentence. Places and
spots carry their preposition, because "in the park" but "on the hill".
"""

from __future__ import annotations


def _split(block: str) -> tuple[str, ...]:
    """Return the comma-separated phrases of a block of text."""
    return tuple(" ".join(phrase.split()) for phrase in block.split(",") if phrase.strip())


GIRLS = _split("""Anna, Bella, Clara, Daisy, Ella, Fiona, Grace, Hanna, Ida, Julia, Kate, Lily,
    Mia, Nora, Olga, Polly, Rosa, Sara, Tina, Ursa, Vera, Wendy, Yara, Zoe, Alma, Betty, Cora,
    Dora, Edith, Freya, Gina, Holly, Iris, Jane, Lucy, Maya, Nell, Ruth, Stella, Tess""")

BOYS = _split("""Adam, Ben, Carl, David, Eli, Fred, George, Hugo, Ivan, Jack, Kim, Leo, Max,
    Noah, Oscar, Paul, Rob, Sam, Tom, Umar, Victor, Will, Yan, Zack, Alan, Bill, Cole, Dan,
    Emil, Finn, Gus, Henry, Jonas, Karl, Luke, Mark, Ned, Peter, Ravi, Simon""")

CREATURE_NAMES = _split("""Pip, Bubbles, Button, Cotton, Dusty, Fern, Ginger, Honey, Inky, Jelly,
    Kiki, Lulu, Misty, Nibbles, Olive, Pebble, Rusty, Sunny, Tuffy, Whisker, Ziggy, Bramble,
    Clover, Dizzy, Echo, Fuzzy, Hazel, Juno, Maple, Nutmeg""")

CREATURES = _split("""fox, rabbit, bear, mouse, owl, frog, duck, hedgehog, squirrel, turtle, deer,
    kitten, puppy, lamb, goat, pony, beaver, badger, crow, goose, hen, mole, otter, penguin,
    lion, monkey, elephant, dragon, robin, snail""")

TRAITS = _split("""little, kind, clever, brave, shy, curious, happy, quiet, cheerful, gentle,
    lazy, busy, lonely, proud, young, funny, careful, polite, sleepy, hungry, lively, stubborn""")

COLOURS = _split("""red, blue, green, yellow, white, black, brown, purple, pink, orange, grey,
    golden, silver""")

TOYS = _split("""kite, ball, drum, boat, doll, whistle, lamp, book, ring, cup, bell, basket,
    hammer, flute, mirror, wagon, pencil, coin, feather, shell, map, puzzle, clock, bucket, spoon,
    blanket, balloon, bicycle, violin, lantern, marble, button, letter, necklace, teapot, sled,
    telescope, compass, top, rope""")

CLOTHES = _split("""hat, coat, scarf, sweater, cap, dress, shirt, jacket, cape, ribbon, belt,
    bow, vest, apron, shawl""")

FOODS = _split("""apple, cake, pear, sandwich, cookie, carrot, plum, pie, muffin, peach, banana,
    melon, pancake, bun, waffle, tomato, potato, biscuit, cherry, nut, tart, pretzel, lemon,
    dumpling, mango""")

PLACES = _split("""in the park, in the forest, at the beach, on the hill, by the river, in the
    garden, at the market, in the village, on the farm, at the school, in the meadow, by the lake,
    at the station, in the library, on the island, in the valley, at the castle, in the barn,
    by the old mill, in the orchard, at the harbour, on the bridge, in the cave, at the zoo,
    in the museum, at the bakery, in the desert, by the waterfall""")

HOMES = _split("""in a small house near the river, in a tall tower, in a cosy cottage, in a
    wooden hut, in a busy town, in a quiet village, on a sunny farm, under an old oak tree,
    in a big city, on a green hill, by the sea, in a deep forest, at the edge of a lake,
    in a stone castle, behind the bakery, next to the school, in a blue house, on a little boat,
    near the mountains, above the shop""")

SPOTS = _split("""under the bed, behind the door, inside a box, on the roof, under a bush,
    behind a rock, in a hole, under the table, on a branch, beside the well, between two stones,
    inside a boot, on top of the shelf, in the tall grass, under a leaf, behind the curtain,
    near the gate, inside an old pot, on the stairs, in a drawer""")

KIN = _split("""mother, father, grandmother, grandfather, aunt, uncle, sister, brother, teacher,
    neighbour, cousin""")

JOBS = _split("""baker, farmer, fisherman, tailor, gardener, painter, sailor, miller, doctor,
    carpenter, shepherd, postman, cook, blacksmith, king, queen""")

WEATHER = _split("""sunny, rainy, windy, cloudy, snowy, foggy, warm, cold, stormy, bright""")

DAYPARTS = _split("""morning, afternoon, evening, day""")

DAYS = _split("""Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday""")

HOBBIES = _split("""sing, dance, read, paint, swim, climb trees, bake, fish, count the stars,
    collect stones, ride horses, tell jokes, play chess, build towers, pick flowers, draw maps,
    chase butterflies, run, skip, write poems""")

FEARS = _split("""the dark, thunder, deep water, big dogs, spiders, loud noises, the wind,
    high places, ghosts, bees, shadows, the cold""")

MATERIALS = _split("""wood, paper, clay, stones, straw, sand, leather, wool, ice, bricks, cloth,
    sticks, snow, glass, mud""")

PROJECTS = _split("""bridge, house, tower, boat, chair, nest, raft, wall, castle, fence, swing,
    tent, table, cart, bench, oven""")

TOOLS = _split("""rope, ladder, net, long stick, basket, shovel, lantern, blanket, bucket,
    wagon, saw, hook""")

PLANTS = _split("""rose, sunflower, pumpkin, tulip, bean, apple tree, cabbage, lily, vine,
    pear tree, daisy, turnip, oak, cactus, strawberry""")

NUMBERS = _split("two, three, four, five, six, seven, eight, nine, ten")

DIGITS = "0123456789"

OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in _split("""big/small, hot/cold, up/down,
    day/night, happy/sad, fast/slow, old/new, open/closed, full/empty, wet/dry, hard/soft,
    loud/quiet, light/dark, high/low, long/short, near/far, clean/dirty, rich/poor, strong/weak,
    early/late, left/right, first/last, inside/outside, thick/thin""")
)

WORLD = tuple(
    tuple(pair.split("/"))
    for pair in _split("""What colour is the sky?/Blue,
    What colour is grass?/Green, What colour is snow?/White, What colour is coal?/Black,
    What colour is a lemon?/Yellow, How many legs does a dog have?/Four,
    How many legs does a bird have?/Two, How many legs does a spider have?/Eight,
    How many days are in a week?/Seven, What do bees make?/Honey, What do cows give?/Milk,
    What do hens lay?/Eggs, What do we call frozen water?/Ice, What shines at night?/The moon,
    What shines in the day?/The sun, Where do fish live?/In water, Where do birds sleep?/In a nest,
    What does a baker make?/Bread, Who grows food?/A farmer, What do we read?/Books,
    What tells the time?/A clock, What keeps us dry in the rain?/An umbrella,
    What comes after Monday?/Tuesday, What comes after Friday?/Saturday,
    What comes after nine?/Ten, What comes after three?/Four, What has wheels?/A wagon,
    What falls from clouds?/Rain, What do rabbits eat?/Carrots, What is a baby cat called?/A kitten,
    What is a baby dog called?/A puppy, What is a baby sheep called?/A lamb""")
)

ONSETS = _split("b, d, f, g, k, l, m, n, p, r, s, t, v, z, br, tr, st, sh")
VOWELS = "aeiou"
