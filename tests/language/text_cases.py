"""Records of the eight commonsense tasks, written for these tests, as the data files hold them."""

from mtl_lora.language.examples import Example
from mtl_lora.language.tasks import COMMONSENSE

INSTRUCTIONS = {
    "boolq": "Please answer the following question with true or false, question: can a candle burn under water?\n\n"
    "Answer format: true/false",
    "piqa": "Please choose the correct solution to the question: how do you dry wet boots?\n\n"
    "Solution1: stuff them with paper\n\nSolution2: fill them with sand and soup\n\nAnswer format: solution1/solution2",
    "social_i_qa": "Please choose the correct answer to the question: Ida lent Tom an umbrella. How would he feel?\n\n"
    "Answer1: thankful Answer2: seasick Answer3: tall\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Baking: A man kneads dough. he\n\n"
    "Ending1: lets it rest. Ending2: reads it aloud. Ending3: plants it. Ending4: paints the moon.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: The jar did "
    "not fit on the shelf because the _ was too low.\n\nOption1: jar Option2: shelf Answer format: option1/option2",
    "ARC-Challenge": "Please choose the correct answer to the question: Which of these is a solid at room warmth?\n\n"
    "Answer1: iron Answer2: steam Answer3: milk Answer4: helium\n\nAnswer format: answer1/answer2/answer3/answer4",
    "ARC-Easy": "Please choose the correct answer to the question: What do roots take up?\n\nAnswer1: light "
    "Answer2: water Answer3: sound\n\nAnswer format: answer1/answer2/answer3",
    "openbookqa": "Please choose the correct answer to the question: A magnet pulls\n\nAnswer1: a nail Answer2: a leaf "
    "Answer3: a cork Answer4: a cloud\n\nAnswer format: answer1/answer2/answer3/answer4",
}


def example(task: str, instruction: str = "", answer: str = "", index: int = 0, **fields) -> Example:
    """A record of a task; by default its instruction above and its first option."""
    instruction = instruction or INSTRUCTIONS[task]
    answer = answer or COMMONSENSE[task].options_of(instruction)[0]
    fields = {"input": "", "output": f"the correct answer is {answer}", **fields}
    return Example(
        instruction=instruction, answer=answer, task_id=COMMONSENSE[task].id, index=index, extra={}, **fields
    )


def record(task: str, **fields) -> dict:
    """The same as a data file holds it."""
    made = example(task, **fields)
    return {name: getattr(made, name) for name in ("instruction", "input", "output", "answer", "task_id")}
