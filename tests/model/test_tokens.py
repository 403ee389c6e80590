from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from taught.model.tokens import TokenTree, ancestors, batches_by_tokens, build_tree, stack, stack_sequences

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6)


@given(SEQUENCES)
def test_the_path_to_a_node_spells_its_sequence(sequences) -> None:
    tree, nodes = build_tree(sequences)
    for sequence, path in zip(sequences, nodes, strict=True):
        assert tree.ids[path].tolist() == sequence
        assert (ancestors(*tree.spans()).sum(1) - 1)[path].tolist() == list(range(len(sequence)))
        # The last token attends to its own path and to nothing else.
        assert ancestors(*tree.spans())[path[-1]].nonzero().flatten().tolist() == path


@given(SEQUENCES)
def test_shared_beginnings_are_stored_once(sequences) -> None:
    tree, _ = build_tree(sequences)
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(tree) == len(beginnings)


def test_padding_attends_to_itself_only_and_nothing_attends_to_it() -> None:
    trees = [build_tree([[1, 2, 3, 4]])[0], build_tree([[5, 6], [5, 7]])[0]]
    rows = stack(trees)
    assert rows.ids.tolist() == [[1, 2, 3, 4], [0, 5, 6, 7]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 1]]
    assert rows.lengths.tolist() == [4, 3]
    assert rows.mask[1].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    additive = rows.additive_mask(torch.float64)
    assert additive.shape == (2, 1, 4, 4)
    assert torch.equal(additive[:, 0] == 0, rows.mask)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60))
def test_batches_hold_every_item_once_within_the_budget(lengths, budget) -> None:
    batches = batches_by_tokens(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= budget or len(batch) == 1


@given(SEQUENCES)
def test_plain_sequences_are_stacked_as_their_trees_are(sequences) -> None:
    plain, trees = stack_sequences(sequences), stack([build_tree([s])[0] for s in sequences])
    for name in ("ids", "positions", "mask", "lengths"):
        ours, theirs = getattr(plain, name), getattr(trees, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_ancestors_of_any_tree_are_those_found_by_walking_up(steps) -> None:
    parents = [node - step - 1 if step <= node else -1 for node, step in enumerate(steps)]
    parents = [max(parent, -1) for parent in parents]
    tree = TokenTree(torch.zeros(len(parents), dtype=torch.long), torch.tensor(parents))
    for node, seen in enumerate(ancestors(*tree.spans()).tolist()):
        walked = {node}
        while (node := parents[node]) >= 0:
            walked.add(node)
        assert {other for other, yes in enumerate(seen) if yes} == walked
