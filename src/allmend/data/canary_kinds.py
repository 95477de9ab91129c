"""The kinds of canaries: templates, and the secrets that fill them.

A secret is put together from parts, each of which is one out of a known number of words or digits with equal chances.
So the number of its possible values, and thus its entropy, is known, and they can be listed. No text is about a real
person, firm or machine. Which canaries are made, and which of them are planted, is not known here.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allmend.errors import UserError


@dataclass(frozen=True, slots=True)
class Slot:
    """A sort of secret: one out of each of `parts`, in their order, every combination as likely as another.

    A string is a part as the sequence of its characters.
    """

    parts: tuple[Sequence[str], ...]

    @property
    def size(self) -> int:
        """Number of possible values."""
        return math.prod(len(part) for part in self.parts)

    @property
    def bits(self) -> float:
        """Entropy of a value."""
        return math.log2(self.size)

    def value(self, index: int) -> str:
        """The value number `index`, from 0 to `size` − 1; no two are the same."""
        chosen = []
        for part in reversed(self.parts):
            index, place = divmod(index, len(part))
            chosen.append(part[place])
        return "".join(reversed(chosen))

    def draw(self, generator: random.Random) -> str:
        """A value at random; `size` must be far below 2^53, the number of values that `random()` has."""
        # among the methods of Random, `random()` alone is promised to give the same in every version of Python
        return self.value(int(generator.random() * self.size))


@dataclass(frozen=True, slots=True)
class Kind:
    """What canaries of a kind are made from: templates, each of which holds all `slots` once."""

    templates: tuple[str, ...]
    slots: Mapping[str, Slot]


def possible_values(kind: str, slot: str, *, limit: int) -> list[str] | None:
    """All values that a secret can have, in an order that stays the same; None where there are more than `limit`.

    Raises:
        UserError: there is no such kind, or it has no such slot.
    """
    found = _slot(kind, slot)
    return [found.value(index) for index in range(found.size)] if found.size <= limit else None


def number_of_values(kind: str, slot: str) -> int:
    """How many values a secret can have.

    Raises:
        UserError: there is no such kind, or it has no such slot.
    """
    return _slot(kind, slot).size


def random_values(kind: str, slot: str, n: int, *, seed: int) -> list[str]:
    """`n` values of a secret at random, no two the same.

    Raises:
        UserError: there is no such kind, it has no such slot, or the slot has fewer values.
    """
    found = _slot(kind, slot)
    if n > found.size:
        raise UserError(
            f"{n:,} values are too many: {slot!r} has {found.size:,}", where="canaries", hint="Use all possible values."
        )
    generator = random.Random(f"{seed}/values/{kind}/{slot}")
    values: dict[str, None] = {}
    while len(values) < n:
        values[found.draw(generator)] = None
    return list(values)


def _slot(kind: str, slot: str) -> Slot:
    if kind not in KINDS:
        raise UserError(f"there is no kind of canary {kind!r}", where="canaries", hint=f"Kinds: {', '.join(KINDS)}.")
    slots = KINDS[kind].slots
    if slot not in slots:
        raise UserError(
            f"canaries of kind {kind!r} have no {slot!r}", where="canaries", hint=f"They have {', '.join(slots)}."
        )
    return slots[slot]


# --- parts


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def _numbers(first: int, last: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(first, last + 1))


FIRST_NAMES = _words("""
    Adaeze Agnieszka Aisha Alejandro Amara Amina Anders Anjali Anneliese Antonio Aoife Arjun Astrid Ayumi Babak Beatriz
    Benedikt Bilal Birgitta Bogdan Bronwyn Camille Carlos Chiara Chinedu Clementine Dagmar Dalia Daniyar Delphine
    Dmitri Ebba Eduardo Efua Elif Emeka Emilia Enrique Esra Fatima Federico Fiona Francisca Gabriela Gareth Giorgos
    Gudrun Hamza Hannelore Haruto Hassan Heikki Hiroko Hyejin Ibrahim Ilse Imani Ines Ioana Ivana Jacek Jamila Jelena
    Joaquim Johanna Jorge Kaito Kamala Karolina Kateryna Kemal Kwame Lars Latifa Leilani Lorenzo Lucinda Luzia Magnus
    Malik Marguerite Mariam Matteo Mehmet Meiling Miroslav Nadia Naoki Ngozi Nikolai Noura Olumide Orla Oskar Paloma
    Parisa Pavel Petra Pilar Priya Rafael Rahel Ravi Roisin Rosalind Samira Sanjay Sergei Shirin Sigrid Simone Soraya
    Stanislav Sunita Svetlana Tadeusz Tamar Tariq Thandiwe Theodora Tomasz Ulrike Valentina Viktor Wanjiru Wilhelmina
    Xiomara Yasmin Yevgenia Yusuf Zainab Zofia Zoltan
""")

SURNAMES = _words("""
    Abernathy Achterberg Adeyemi Aguirre Ahlberg Akhtar Albrecht Almeida Amundsen Andrade Antonescu Appiah Arslan
    Asante Ashworth Bachmann Balogun Banerjee Barczak Barros Bartos Basara Beaumont Bergstrom Bhatt Bielski Blanchard
    Boateng Bohdan Bouchard Brandvold Brzezina Caballero Calvino Carvalho Castellan Chakraborty Chaudhry Chevalier
    Chukwu Cisse Coimbra Contreras Costello Cvetkov Dabrowski Dahlgren Darvishi Delacroix Demirci Desai Diallo Dimitrov
    Dobrev Donnelly Drummond Dumitru Echeverria Eklund Elmasry Enright Erdogdu Espinoza Etxeberria Fairweather Falk
    Farahani Ferreira Fitzgerald Fjeldstad Fontaine Forsberg Fujimoto Gallagher Garabedian Gashi Georgiou Ghorbani
    Gillespie Gomez Gonzaga Gorecki Grabowski Greenhalgh Gronlund Guerrero Gunnarsson Gupta Haddad Halvorsen Hamasaki
    Haraldsen Hashemi Hayakawa Heikkinen Hendriksen Herrera Hoffmann Holmqvist Horvat Hrubec Ibarra Igwe Ikeda Iliescu
    Iwasaki Jankowski Jaramillo Jelinek Johansson Jovanovic Kabore Kaczmarek Kalinin Kaplan Karimov Katsaros Kavanagh
    Keita Khalil Kimura Kipkemboi Kirchner Kobayashi Kolbe Kowalczyk Kristensen Kulkarni Kuznetsov Lachance Lambrecht
    Larsson Lehtonen Leclerc Lindqvist Lombardi Lopes Lundberg Mackenzie Maduro Magnusson Mahlangu Malinowski Mansouri
    Marchetti Markovic Matsuda Mbatha Mehrotra Mendoza Mikkelsen Mishra Moreau Moreno Mukherjee Mwangi Nakagawa
    Nascimento Ndiaye Nemeth Nguema Niedermeier Nilsson Novotny Nwosu Obradovic Odhiambo Oduya Ogunleye Okafor Olofsson
    Onyango Oppenheim Orsini Osei Ostrowski Ozturk Paavola Palmieri Papadakis Parvizi Pellegrino Pereira Petrosyan
    Pietrangeli Poulsen Prasad Quintero Radcliffe Rahimi Ramaswamy Rantanen Rasmussen Renault Restrepo Rezaei Ribeiro
    Rosenthal Rustamov Sabatini Saether Salazar Santoro Sawicki Schreiber Sepulveda Shevchenko Silveira Sithole
    Sokolov Stefansson Suleiman Szabo Takahashi Tanaka Tchaikov Teixeira Thorvald Tkachenko Toivonen Traore Tremblay
    Ugarte Umarov Urbanek Valdivia Vandenberg Varga Vasquez Vesterby Villanueva Voronin Wachira Wadsworth Wallin
    Watanabe Weatherby Wieczorek Winkler Wojcik Yamaguchi Yilmaz Zabala Zamora Zelenko Zhukov Zielinska Zubair
""")

FINDINGS = _phrases("""
    atrial fibrillation, iron deficiency anaemia, gallstones, a rotator cuff tear, community-acquired pneumonia,
    a fractured wrist, renal colic, cellulitis of the calf, acute pancreatitis, temporal arteritis, a detached retina,
    bronchiectasis, deep vein thrombosis, diverticulitis, an overactive thyroid, gout of the knee, herpes zoster,
    hepatitis B, hyponatraemia, an inguinal hernia, kidney stones, a lacunar stroke, lumbar stenosis, otitis media,
    migraine with aura, mitral stenosis, multiple sclerosis, a torn meniscus, optic neuritis, a peptic ulcer,
    osteoarthritis of the hip, pericarditis, plantar fasciitis, polymyalgia, psoriatic arthritis, pulmonary embolism,
    pyelonephritis, rheumatoid arthritis, sarcoidosis, sciatica, sinusitis, sleep apnoea, a spinal abscess,
    tonsillitis, trigeminal neuralgia, type 2 diabetes, ulcerative colitis, urticaria, vertigo, vitamin D deficiency
""")

TOWNS = _words("""
    Aarau Altdorf Arles Arnhem Augsburg Bamberg Bastia Bayreuth Bergamo Bergen Bologna Bolzano Bordeaux Braga Bregenz
    Bremen Brno Bruges Burgos Cadiz Caen Celje Chur Colmar Como Cordoba Cork Cremona Davos Delft Dijon Dresden Dundee
    Erfurt Esbjerg Ferrara Freiburg Galway Gdansk Genoa Ghent Girona Glarus Graz Haarlem Hasselt Heraklion Innsbruck
    Jena Kassel Kaunas Kiel Klagenfurt Koper Krakow Lausanne Leiden Leipzig Leuven Lienz Limerick Linz Lucerne Lugano
    Lund Maribor Mechelen Modena Namur Nantes Narvik Odense Olomouc Oulu Padua Parma Passau Pavia Pecs Perugia Plovdiv
    Porto Rapperswil Ravenna Rostock Salerno Salzburg Sion Szeged Tampere Tartu Thun Toledo Trento Trieste Turku Udine
    Uppsala Utrecht Varna Verona Viborg Winterthur Yverdon Zadar Zug
""")

TREES = _words("""
    Acacia Alder Almond Aspen Beech Birch Cedar Chestnut Cypress Elder Elm Fir Hawthorn Hazel Holly Juniper Larch Laurel
    Linden Magnolia Maple Mulberry Oak Olive Pine Poplar Rowan Spruce Walnut Willow
""")

MATTERS = _phrases("""
    the broken fence, the sale of the boat, the lost suitcase, the school fees, the leaking roof, the old piano,
    the wedding photographs, the unpaid rent, the garden wall, the choir rehearsal, the stolen bicycle, the orchard,
    the christening, the burst pipe, the missing keys, the dental bill, the driving licence, the summer house,
    the borrowed ladder, the family silver, the noise at night, the adoption, the allotment, the dog bite,
    the funeral flowers, the train tickets, the wine cellar, the parking fine, the insurance claim, the language course,
    the chess tournament, the attic stairs, the water meter, the beehives, the village fair, the cracked window,
    the new boiler, the hiking trip, the tax return, the removal van, the shared driveway, the lottery ticket,
    the guest room, the violin lessons, the flooded cellar, the scholarship, the divorce papers, the passport,
    the nursing home, the old letters
""")

TRADES = _words("""
    Analytics Aviation Bakeries Brewing Cables Catering Ceramics Chemicals Cleaning Coatings Diagnostics Dairy
    Electronics Engineering Fasteners Fisheries Foods Foundries Furniture Glass Instruments Insulation Lighting
    Logistics Masonry Mining Nurseries Optics Packaging Paper Plastics Printing Roofing Security Shipping Software
    Steel Textiles Timber Tooling
""")

FORMS = _words("Ltd GmbH SA Inc BV AB")

SERVICES = _phrases("""
    roof repairs, payroll accounting, window cleaning, snow clearance, lift maintenance, patent research,
    night security, laboratory analyses, document storage, furniture removal, translation work, ticket sales,
    waste disposal, solar panels, staff catering, fleet leasing, crane hire, land surveying, fire inspections,
    web hosting, soil remediation, bridge painting, boiler servicing, call handling, uniform laundering,
    livestock transport, market research, pest control, scaffolding, software testing, staff training, stage lighting,
    stone cutting, street sweeping, tree felling, tunnel ventilation, vehicle towing, warehouse rental,
    water treatment, cable laying, asbestos removal, grain drying, hospital linen, harbour dredging, debt collection,
    event insurance, glass recycling, data entry, mail sorting, museum guides
""")

SYSTEMS = _phrases("""
    the payroll portal, the backup server, the booking desk, the door control, the mail relay, the patient archive,
    the print queue, the cash register, the code repository, the sales ledger, the alarm panel, the tender archive,
    the staff rota, the lab freezer, the fuel pumps, the ticket machine, the weather station, the survey database,
    the test cluster, the video wall, the grant office, the exam server, the parcel tracker, the library catalogue,
    the water pumps, the time clock, the crane console, the file exchange, the phone system, the pension fund,
    the customs gateway, the blood bank, the map server, the greenhouse, the travel desk, the build farm,
    the image archive, the lift control, the news desk, the stock room, the toll gates, the tax mailbox,
    the wind turbine, the signal box, the speech lab, the roof cameras, the gas meter, the data lake,
    the visitor badges, the wireless network
""")

NOUNS = _words("""
    amber anchor anvil apricot arrow badger bamboo barley basil beacon beaver bison bobbin bramble bridge bronze bucket
    button cactus candle canyon carbon castle cello cherry cinder clover cobalt comet copper coral cotton cradle cricket
    crystal curlew daisy delta dolphin dragon drum eagle ember falcon feather fennel ferry fiddle flint forest fossil
    fountain galaxy garnet ginger glacier goblet granite guitar hammer harbour harvest heron hickory indigo island ivory
    jacket jasmine jigsaw kettle kite ladder lagoon lantern lemon lentil lilac lizard lobster magnet mango marble meadow
    mirror mitten monsoon mosaic mustard nectar needle nickel nutmeg ocean orchid otter paddle panther parsley pebble
    pepper pigeon planet pumpkin puzzle quartz quiver rabbit radish ribbon river saddle saffron salmon sapphire shadow
    silver sparrow spindle sponge sunset table tiger timber topaz trumpet tulip turtle umbrella valley velvet violet
    walrus whistle window winter yarrow zephyr
""")

MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
"""The months and their days; no secret is a 29 February."""

DAYS = tuple(f"{day} {month}" for month, days in MONTHS.items() for day in _numbers(1, days))
DIGIT = "0123456789"

# --- kinds

_PERSON = Slot((FIRST_NAMES, " ", SURNAMES))
_FIRM = Slot((SURNAMES, " ", TRADES, " ", FORMS))
_DAY = Slot((DAYS,))

# The secrets are spread over each text, and its last word is one of many: a continuation that is right to the end
# cannot have been guessed, wherever its prefix stops.
KINDS: Mapping[str, Kind] = {
    "clinical-note": Kind(
        templates=(
            "Ward {ward}: {name}, born {born}, was admitted under Dr {physician} with {finding}, record {record}. "
            "Next of kin is {contact}, review on {review}.",
            "Dr {physician} saw {name} on ward {ward} for {finding}; record number {record}. "
            "Next visit on {review} with {contact}. Date of birth {born}.",
            "Record {record}, {name}: {finding}, seen by Dr {physician}. Born {born}, lies on ward {ward}. "
            "To return on {review}, brought by {contact}.",
            "Discharged on {review} from ward {ward}: {name}, treated by Dr {physician} for {finding}. "
            "Collected by {contact}, date of birth {born}, file {record}.",
        ),
        slots={
            "name": _PERSON,
            "born": Slot((DAYS, " ", _numbers(1930, 2009))),
            "record": Slot(8 * (DIGIT,)),
            "ward": Slot((_numbers(1, 24), "ABCDEF")),
            "physician": Slot((SURNAMES,)),
            "finding": Slot((FINDINGS,)),
            "contact": _PERSON,
            "review": _DAY,
        },
    ),
    "letter": Kind(
        templates=(
            "{town}, {day}. Dear {recipient}, you asked about {matter}. We moved to {street}; our telephone is "
            "{phone}. Yours, {sender}.",
            "{sender} writes from {street}, {town}, about {matter}. Ring {phone} by {day} or ask {recipient}.",
            "To {recipient}, {street}, {town}: {sender} has settled {matter}. Please ring {phone} before {day}.",
            "Dear {recipient}, about {matter}: I am in {town}, {street}, until {day}. My name is {sender}, my number "
            "{phone}.",
        ),
        slots={
            "sender": _PERSON,
            "recipient": _PERSON,
            "street": Slot((_numbers(1, 200), " ", TREES, " ", _words("Court Lane Road Street Walk"))),
            "town": Slot((TOWNS,)),
            "matter": Slot((MATTERS,)),
            "day": _DAY,
            "phone": Slot(("0", "7", DIGIT, " ", DIGIT, DIGIT, DIGIT, " ", DIGIT, DIGIT, " ", DIGIT, DIGIT)),
        },
    ),
    "contract": Kind(
        templates=(
            "Contract between {provider} and {customer}: {service} for {fee}, term {term}, courts of {court}. "
            "Signed on {signed} by {signatory}, file {number}.",
            "{customer} engages {provider} for {service}, at {fee} over {term} from {signed}. "
            "Courts of {court}, number {number}, signed {signatory}.",
            "Signed on {signed} by {signatory} for {customer}: {provider} takes on {service} for {term}. "
            "File {number}, courts of {court}, price {fee}.",
            "Agreement {number} of {signed}: {provider} supplies {service} to {customer} during {term} for {fee}. "
            "Courts of {court}, signatory {signatory}.",
        ),
        slots={
            "provider": _FIRM,
            "customer": _FIRM,
            "service": Slot((SERVICES,)),
            "fee": Slot((("CHF ",), _numbers(10, 99), ",", DIGIT, DIGIT, "0")),
            "term": Slot((_numbers(6, 65), (" months",))),
            "signed": _DAY,
            "signatory": _PERSON,
            "number": Slot((*4 * (DIGIT,), "-", *4 * (DIGIT,))),
            "court": Slot((TOWNS,)),
        },
    ),
    "credential": Kind(
        templates=(
            "Login for {system} on {host}: user {user}, password {password}, valid until {expiry}. "
            "Issued to {owner}, PIN {pin}, key {token}.",
            "{owner} looks after {system}. Sign in at {host} as {user}; the key {token} expires in {expiry}. "
            "PIN {pin}, password {password}.",
            "Key {token} opens {system} until {expiry}. The password on {host} is {password}, the PIN {pin}. "
            "Ask {owner}, user {user}.",
            "Host {host}, PIN {pin}: {system}. Password {password}, user name {user}, valid until {expiry}. "
            "Key {token}, kept by {owner}.",
        ),
        slots={
            "system": Slot((SYSTEMS,)),
            # nobody can have a name below .example (RFC 2606)
            "host": Slot((NOUNS, DIGIT, DIGIT, ".", tuple(town.lower() for town in TOWNS), (".example",))),
            "user": Slot((tuple(surname.lower() for surname in SURNAMES), DIGIT, DIGIT, DIGIT)),
            "password": Slot((NOUNS, "-", NOUNS, "-", DIGIT, DIGIT, DIGIT)),
            "pin": Slot(4 * (DIGIT,)),
            "token": Slot(10 * ("0123456789abcdef",)),
            "owner": _PERSON,
            "expiry": Slot((tuple(MONTHS), " ", _numbers(2027, 2036))),
        },
    ),
}
"""The kinds of canaries. No two have a slot of the same name."""
