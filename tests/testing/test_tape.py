import torch

from mmtp.testing import tape


def test_operations_are_run_again_on_the_same_memory_and_python_is_not() -> None:
    given, memory, place, runs = torch.arange(3.0), torch.zeros(4, 3), torch.tensor([0]), []

    def run() -> torch.Tensor:
        runs.append(len(runs))
        memory[place] = given  # in place, at an index that stands in a tensor
        view = memory.T[1:]
        return view.relu() + float(given.numel())

    replay = tape.record(run, torch.device("cpu"))
    first = replay()
    assert first.tolist() == [[4.0, 3.0, 3.0, 3.0], [5.0, 3.0, 3.0, 3.0]]
    given.copy_(torch.tensor([7.0, -1.0, 8.0]))
    place.fill_(2)
    assert replay() is first and first.tolist() == [[4.0, 3.0, 3.0, 3.0], [5.0, 3.0, 11.0, 3.0]]
    assert memory[2].tolist() == [7.0, -1.0, 8.0]
    assert runs == [0, 1]
