"""Plays openai-python's loop of tools (ask, call, result, answer) with 50 functions, against a server.

    pip install '.[dev]' && llamajax serve
    python -m scripts.tool_loop http://127.0.0.1:8000/v1

Each function is offered in three ways: among others, where a call is required; alone, by its name; and among others,
where the model decides. Required arguments must be valid under their schema, and each result must get its answer. Each
fault is printed, and makes the exit code 1.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai

FUNCTIONS = """
weather(city: str, unit: celsius|fahrenheit): How is the weather in Lima?
time_in(city: str): What time is it in Tokyo?
add(a: num, b: num): What is 17 plus 25?
divide(a: num, b: num): What is 91 divided by 7?
power(base: num, exponent: 0..9): What is 2 to the power of 8?
square_root(of: num): What is the square root of 144?
convert(amount: num, source: EUR|USD|PEN, target: EUR|USD|PEN): How many dollars are 20 euros?
translate(text: str, language: de|en|es|fr): Translate "good morning" into French.
spell(word: str): How do you spell "necessary"?
synonyms(word: str, count: 1..5): Give me 3 synonyms of "happy".
define(word: str): What does "ephemeral" mean?
rhyme(word: str): What rhymes with "moon"?
search(query: str, pages: 1..3): Search for llamas in Peru.
news(topic: str, day: date): What happened in sports on 2024-05-01?
stock(symbol: [A-Z]{1,5}): What is the price of AAPL?
flight(number: [A-Z]{2}[0-9]{1,4}): Is flight LH454 on time?
train(start: str, end: str, day: date): Is there a train from Bern to Basel on 2025-01-02?
hotel(city: str, nights: 1..30, stars: 1..5): Find a hotel with 4 stars in Cusco for 3 nights.
restaurant(city: str, kitchen: italian|indian|peruvian): Where can I eat Indian food in Graz?
recipe(dish: str, persons: 1..12): How do I cook lentils for four?
calories(food: list): How many calories have an apple and a banana?
shop(items: list): Put milk and bread on my list.
reminder(text: str, at: date-time): Remind me of the dentist on 2025-03-04 at nine.
alarm(hour: 0..23, minute: 0..59): Wake me at 6:30.
timer(seconds: 1..3600): Set a timer of five minutes.
event(title: str, day: date, guests: list): Plan a dinner with Ann and Bob on 2025-06-07.
holidays(country: AT|CH|DE, year: 2020..2030): Which holidays has Austria in 2025?
age(born: date): How old is somebody born on 1990-10-11?
weekday(day: date): What day of the week is 2025-12-24?
email(to: email, subject: str, body: str): Write to ann@example.org that I am late.
message(to: str, text: str): Tell Bob that dinner is ready.
call(number: [+][0-9]{8,12}): Call +43123456789.
contact(name: str, phone: str?, mail: email?): Save Ann's address, ann@example.org.
play(song: str, artist: str?): Play Yesterday by the Beatles.
volume(percent: 0..100): Make it half as loud.
light(room: str, on: bool): Turn on the light in the kitchen.
heating(room: str, degrees: 5..30): Make the bath 22 degrees warm.
door(action: lock|unlock): Lock the door.
map(place: str, zoom: 1..20): Show me a map of Vienna.
route(start: str, end: str, by: car|bike|foot): How do I get from Linz to Wels by bike?
distance(start: str, end: str): How far is it from Rome to Milan?
population(country: str): How many people live in Peru?
capital(country: str): What is the capital of Chile?
planet(name: Mercury|Venus|Mars|Jupiter): Tell me about Mars.
element(symbol: [A-Z][a-z]?): What is Fe?
prime(number: 0..1000): Is 91 a prime number?
sort(numbers: nums, descending: bool): Sort 5, 3 and 9, the largest first.
sample(count: 1..6, sides: 4|6|20): Roll two dice.
open_url(url: uri): Open https://example.org/news.
run_sql(query: str, limit: 1..100): How many customers do we have?
""".strip().splitlines()


def schema_of(kind: str) -> dict[str, Any]:
    """A parameter's, from its short form."""
    match kind.removesuffix("?") if kind.endswith(("str?", "email?")) else kind:
        case "str":
            return {"type": "string"}
        case "num":
            return {"type": "number"}
        case "bool":
            return {"type": "boolean"}
        case "list":
            return {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 5}
        case "nums":
            return {"type": "array", "items": {"type": "integer"}, "maxItems": 9}
        case "date" | "date-time" | "email" | "uri" as form:
            return {"type": "string", "format": form}
        case bounds if ".." in bounds:
            low, high = map(int, bounds.split(".."))
            return {"type": "integer", "minimum": low, "maximum": high}
        case pattern if pattern.startswith("["):
            return {"type": "string", "pattern": f"^{pattern}$"}
        case names:
            return {"enum": names.split("|")}


def tool_of(line: str) -> tuple[Any, str]:
    """A function as clients offer it, and a question that it answers."""
    read = re.fullmatch(r"(\w+)\((.*)\): (.*)", line)
    assert read, line
    name, parameters, question = read.groups()
    given = [parameter.split(": ") for parameter in parameters.split(", ")]
    schema = {
        "type": "object",
        "properties": {key: schema_of(kind) for key, kind in given},
        "required": [key for key, kind in given if not kind.endswith(("str?", "email?"))],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": question, "parameters": schema}}, question


TOOLS = [tool_of(line) for line in FUNCTIONS]


def play(client: openai.OpenAI, model: str, number: int, kind: str) -> Counter[str]:
    """One loop. Returns how its answers ended; raises if something is wrong with one."""
    tool, question = TOOLS[number]
    # All of them would be a prompt longer than the context.
    offered = [tool] if kind == "named" else [TOOLS[(number + i) % len(TOOLS)][0] for i in range(2)]
    schemas = {it["function"]["name"]: it["function"]["parameters"] for it in offered}
    choice: Any = {"type": "function", "function": {"name": tool["function"]["name"]}} if kind == "named" else kind
    asked: Any = {"model": model, "tools": offered, "temperature": 1, "seed": number, "max_tokens": 150}
    # The model would go on calling.
    asked["parallel_tool_calls"] = False
    said: list[Any] = [{"role": "user", "content": question}]
    [answer] = client.chat.completions.create(messages=said, tool_choice=choice, **asked).choices
    calls = answer.message.tool_calls or []
    assert kind == "auto" or calls or answer.finish_reason == "length", answer
    assert (answer.finish_reason == "tool_calls") == bool(calls) or answer.finish_reason == "length", answer
    said.append(answer.message)
    for call in calls:
        assert call.type == "function", call
        arguments = json.loads(call.function.arguments)
        if kind != "auto":
            check(arguments, schemas[call.function.name])
        said.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"done": arguments})})
    # The answer may be another call, whose result would follow.
    [final] = client.chat.completions.create(messages=said, **asked | {"max_tokens": 60}).choices
    assert final.message.content or final.message.tool_calls or final.finish_reason == "stop", final
    return Counter({f"{kind}: {answer.finish_reason}, {len(calls)} calls": 1, f"then {final.finish_reason}": 1})


def check(arguments: Any, schema: Mapping[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    validator.validate(arguments)


def main(url: str) -> int:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    outcomes, wrong = Counter[str](), 0
    loops = [(number, kind) for kind in ("required", "named", "auto") for number in range(len(TOOLS))]
    with ThreadPoolExecutor(8) as threads:
        futures = {loop: threads.submit(play, client, model, *loop) for loop in loops}
        for (number, kind), future in futures.items():
            if error := future.exception():
                wrong += 1
                print(f"{FUNCTIONS[number]} ({kind}): {type(error).__name__}: {error!s:.300}")
            else:
                outcomes += future.result()
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{len(loops)} loops with {len(TOOLS)} functions, {wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
