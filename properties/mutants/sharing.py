"""How splits are shared out among programs, and merged in groups whoever took them."""

from __future__ import annotations

from properties.mutants.mutant import CACHE, PRIMITIVES, RELAUNCH, SPLIT_KV, TUNING, WRAPPER, Edit, Mutant

BITS = ("a_row_of_many_splits_alone", "a_stream_over_many_splits")
VALUES = ("a_stream_over_many_splits", "within_the_error_budget")
STREAM = ("a_stream_over_many_splits", "steady_stream")
LONG = ("rows_long_enough", "every_kernel_gives")

_GROUP_ENDS = "if start_n == group_stop:"
_NEXT_GROUP = "                    group_stop += SPLIT_GROUP * split_size\n"
_NEXT_SPLIT = "                split_stop += split_size\n"
_NEW_SPLIT = "                acc, m_i, l_i = no_keys(BLOCK_M, BLOCK_D)\n"
_NEW_GROUP = "                    group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)\n"
_LAST_OF_GROUP = "            acc, m_i, l_i = merge_partial(group_acc, group_m, group_l, acc, m_i, l_i)\n"
_OWN_GROUP = "    if not ARE_GROUPS:\n        group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)\n"
_MERGED_GROUP = "    if not ARE_GROUPS:\n        group_acc, group_m, group_l = merge_partial(acc,"
_WIDE_OWN_GROUP = """\
            if not ARE_GROUPS:
                group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)
"""
_WIDE_MERGED_GROUP = "            if ARE_GROUPS:\n                acc,"
_SEVERAL = '"SEVERAL": splits_per_program > 1'
_TAKE = "return min(SPLIT_GROUP, most) if"
_SECOND_TIER = "tl.cdiv(shortest, 2), 2 * few_splits"


def _sharing(
    id_: str, change: str, where: str, file: str, anchor: str, replacement: str, laws: tuple[str, ...] = VALUES
) -> Mutant:
    return Mutant(id_, "SHARE", change, where, (Edit(file, anchor, replacement),), laws)


MUTANTS = (
    _sharing(
        "F400",
        "a program that has a whole row merges its splits one after the other, not in groups",
        "a program with five splits or more of a row, a batch in which programs have fewer",
        SPLIT_KV,
        _GROUP_ENDS,
        "if start_n > stop:",
        BITS,
    ),
    _sharing(
        "F401",
        "the first group has a split more than the others",
        "a program with a whole row of five splits or more",
        SPLIT_KV,
        "group_stop = start + SPLIT_GROUP * split_size",
        "group_stop = start + (SPLIT_GROUP + 1) * split_size",
        BITS,
    ),
    _sharing(
        "F402",
        "after the first group a program merges the rest of its row as one",
        "a program with a whole row of nine splits or more",
        SPLIT_KV,
        _NEXT_GROUP,
        "",
        BITS,
    ),
    _sharing(
        "F403",
        "all splits of a program but the first run into one",
        "a program with three splits or more",
        SPLIT_KV,
        _NEXT_SPLIT,
        "",
        BITS,
    ),
    _sharing(
        "F404",
        "a program's next split starts with what the last one found",
        "a program with several splits",
        SPLIT_KV,
        _NEW_SPLIT,
        "",
    ),
    _sharing(
        "F405",
        "a program's next group starts with what the last one found",
        "a program with a whole row of five splits or more",
        SPLIT_KV,
        _NEW_GROUP,
        "",
    ),
    _sharing(
        "F406",
        "a program forgets all splits of a group but the last",
        "a program with several splits",
        SPLIT_KV,
        _LAST_OF_GROUP,
        "            pass\n",
    ),
    _sharing(
        "F407",
        "a program that has a whole row forgets all groups but the last",
        "a program with a whole row of five splits or more",
        SPLIT_KV,
        "            if has_whole_row:\n",
        "            if has_whole_row & (num_splits <= SPLIT_GROUP):\n",
    ),
    _sharing(
        "F408",
        "a group is kept where its first split would be",
        "programs with a group of splits",
        SPLIT_KV,
        "mine = scratch + first_split // splits_per_program * step",
        "mine = scratch + first_split * step",
    ),
    _sharing(
        "F409",
        "the last program waits for as many arrivals as there are splits",
        "programs with a group of splits",
        SPLIT_KV,
        "== num_partials - 1",
        "== num_splits - 1",
    ),
    _sharing(
        "F410",
        "a program that has exactly all splits of a row does not know that it has the whole row",
        "a program with a whole row of five splits or more",
        SPLIT_KV,
        "has_whole_row = splits_per_program >= num_splits",
        "has_whole_row = splits_per_program > num_splits",
    ),
    _sharing(
        "F411",
        "a program whose last split is just the row's last is not the row's last program",
        "a number of splits that programs divide evenly",
        SPLIT_KV,
        "is_last = first_split + splits_per_program >= num_splits",
        "is_last = first_split + splits_per_program > num_splits",
    ),
    Mutant(
        "F412",
        "SHARE",
        "stored splits are merged one after the other, stored groups in groups",
        "programs with one of five splits or more, a batch in which they have more",
        (
            Edit(PRIMITIVES, _OWN_GROUP, _OWN_GROUP.replace("not ", "")),
            Edit(PRIMITIVES, _MERGED_GROUP, _MERGED_GROUP.replace("not ", "")),
            Edit(PRIMITIVES, _WIDE_OWN_GROUP, _WIDE_OWN_GROUP.replace("not ", "")),
            Edit(PRIMITIVES, _WIDE_MERGED_GROUP, _WIDE_MERGED_GROUP.replace("if ", "if not ")),
        ),
        BITS,
    ),
    _sharing(
        "F413",
        "each group of stored splits has those of the groups before, too",
        "programs with one of five splits or more",
        PRIMITIVES,
        _OWN_GROUP,
        "",
    ),
    _sharing(
        "F460",
        "the second of two stored groups that were loaded together is left out if it is of one",
        "five or thirteen stored states",
        PRIMITIVES,
        "if second < n:",
        "if second + 1 < n:",
    ),
    _sharing(
        "F461",
        "stored groups that were loaded together are merged twice",
        "more than four stored states",
        PRIMITIVES,
        "range(0, n, 2 * SPLIT_GROUP)",
        "range(0, n, SPLIT_GROUP)",
    ),
    _sharing(
        "F462",
        "four rows are merged, however many heads share a kv head",
        "one query, more than four heads a kv head, several programs a row",
        TUNING,
        "max(LEAST_MERGED_ROWS, next_power_of_2(rows))",
        "LEAST_MERGED_ROWS",
    ),
    _sharing(
        "F414",
        "stored groups of splits are merged in groups of groups",
        "programs with a group of splits, 21 splits or more",
        SPLIT_KV,
        "                in_head, MERGE_M, BLOCK_D, SEVERAL,\n",
        "                in_head, MERGE_M, BLOCK_D, False,\n",
        BITS,
    ),
    _sharing(
        "F415",
        "the kernel for programs with several splits is launched for programs with one",
        "few rows of five splits or more",
        WRAPPER,
        _SEVERAL,
        '"SEVERAL": grid_splits > 1',
        BITS,
    ),
    _sharing(
        "F416",
        "the kernel for programs with one split is launched for programs with a group",
        "programs with a group of splits",
        WRAPPER,
        _SEVERAL,
        '"SEVERAL": splits_per_program > tuning.SPLIT_GROUP',
        BITS,
    ),
    _sharing(
        "F417",
        "the grid has a program for each split, whatever a program takes",
        "programs with several splits",
        WRAPPER,
        "programs = tuning.ceil_div(grid_splits, splits_per_program) * num_kv_heads * batch",
        "programs = grid_splits * num_kv_heads * batch",
    ),
    _sharing(
        "F418",
        "the grid has only the programs that are full",
        "a number of splits that programs do not divide evenly",
        WRAPPER,
        "programs = tuning.ceil_div(grid_splits, splits_per_program) * num_kv_heads * batch",
        "programs = max(1, grid_splits // splits_per_program) * num_kv_heads * batch",
    ),
    _sharing(
        "F419",
        "a row has as many programs as the longest row has splits",
        "programs with several splits, batch >= 2 or several kv heads",
        SPLIT_KV,
        "row_programs = tl.cdiv(grid_splits, splits_per_program)",
        "row_programs = grid_splits",
    ),
    _sharing(
        "F420",
        "programs of a row start a split apart, however many they take",
        "programs with a group of splits",
        SPLIT_KV,
        "% row_programs * splits_per_program",
        "% row_programs",
    ),
    _sharing(
        "F421",
        "a program takes the keys of its first split only",
        "programs with several splits",
        SPLIT_KV,
        "stop = tl.minimum(start + splits_per_program * split_size, cached)",
        "stop = tl.minimum(start + split_size, cached)",
    ),
    _sharing(
        "F422",
        "only full groups count as stored",
        "programs with a group of splits, the last one not full",
        SPLIT_KV,
        "num_partials = tl.cdiv(num_splits, splits_per_program)",
        "num_partials = num_splits // splits_per_program",
    ),
    _sharing(
        "F423",
        "of two splits that one program has the first is forgotten",
        "a program with a whole row of two splits",
        SPLIT_KV,
        "        if num_splits > 1:\n",
        "        if num_splits > 2:\n",
    ),
    _sharing(
        "F424",
        "a program takes a split less than is merged first",
        "programs with a group of splits",
        TUNING,
        _TAKE,
        "return min(SPLIT_GROUP - 1, most) if",
        BITS,
    ),
    _sharing(
        "F425",
        "a program takes two groups of splits but has no place for the first",
        "rows of nine splits or more in which one program does not have all",
        TUNING,
        _TAKE,
        "return min(2 * SPLIT_GROUP, most) if",
    ),
    _sharing(
        "F426",
        "the device makes twice as many splits as the host before they get longer",
        "rows of more than eight splits, split left to the kernel",
        PRIMITIVES,
        "wanted = tl.minimum(shortest, few_splits)",
        "wanted = tl.minimum(shortest, 2 * few_splits)",
        LONG,
    ),
    _sharing(
        "F427",
        "the device makes four times as many splits as are few, the host twice as many",
        "rows of more than 16 splits, split left to the kernel",
        PRIMITIVES,
        _SECOND_TIER,
        _SECOND_TIER.replace("2 * few_splits", "4 * few_splits"),
        LONG,
    ),
    _sharing(
        "F428",
        "the host does not know that splits become more again when they are twice as long",
        "rows of more than 16 splits, split left to the kernel",
        TUNING,
        "min(ceil_div(cached, 2 * size), 2 * self.few_splits)",
        "min(ceil_div(cached, 2 * size), self.few_splits)",
        LONG,
    ),
    _sharing(
        "F429",
        "the grid has fewer splits for a row just too long for few of them than for a shorter one",
        "rows of more than eight splits, split left to the kernel",
        TUNING,
        "min(ceil_div(cached, size), self.few_splits)",
        "ceil_div(cached, size) * (cached <= self.few_splits * size)",
        LONG,
    ),
    _sharing(
        "F430",
        "the grid of a repeated launch has a program for each split, whatever a program takes",
        "repeated steps, programs with several splits",
        RELAUNCH,
        "programs = tuning.ceil_div(splits, per_program) * self.heads",
        "programs = splits * self.heads",
        STREAM,
    ),
    _sharing(
        "F431",
        "a repeated launch's programs take as many splits as the first one's",
        "repeated steps across a split's edge, programs with a whole row",
        RELAUNCH,
        '"splits_per_program"',
        '"stride_new"',
        STREAM,
    ),
    _sharing(
        "F432",
        "a repeated launch does not look whether another kernel is needed",
        "repeated steps in which programs begin to take several splits",
        RELAUNCH,
        "return bound is None or (takes_several is self.takes_several and shares.is_crowded is self.is_crowded)",
        "return True",
        BITS,
    ),
    _sharing(
        "F433",
        "a repeated launch keeps its splits for one slot more than they hold",
        "repeated steps across a split's edge",
        RELAUNCH,
        "range(last - size + 1, last + 1)",
        "range(last - size + 1, last + 2)",
        STREAM,
    ),
    _sharing(
        "F434",
        "a repeated launch keeps the splits of the first",
        "repeated steps across a split's edge",
        RELAUNCH,
        "(bound not in shares.bounds or",
        "(not shares.bounds or",
        STREAM,
    ),
    _sharing(
        "F477",
        "rows that are split have the kernel for rows that are not",
        "many rows of several splits, 16 bits, head_dim from 33 on",
        TUNING,
        "of_16_bits and splits == 1 and many",
        "of_16_bits and many",
        ("every_kernel",),
    ),
    _sharing(
        "F435",
        "a program's last group is not merged with those before where it has a split only",
        "a program with a whole row of one split more than groups take",
        SPLIT_KV,
        "            if has_whole_row:\n",
        "            if has_whole_row & (num_splits % SPLIT_GROUP != 1):\n",
    ),
    _sharing(
        "F436",
        "the first split of a program is merged into its group with the second",
        "programs with several splits",
        SPLIT_KV,
        "split_stop = start + split_size\n",
        "split_stop = start + 2 * split_size\n",
        BITS,
    ),
    _sharing(
        "F437",
        "where registers are few only the first stored split of each group is merged",
        "programs with one of several splits, wide tiles",
        PRIMITIVES,
        "for i in range(first, first + SPLIT_GROUP):",
        "for i in range(first, first + 1):",
    ),
    _sharing(
        "F438",
        "where registers are many the second stored state of a group stands in for the third, too",
        "programs with one of several splits",
        PRIMITIVES,
        "group_l, states[6], states[7], states[8])",
        "group_l, states[3], states[4], states[5])",
    ),
    _sharing(
        "F439",
        "a launch is repeated that nobody shared the splits out for",
        "repeated steps",
        CACHE,
        " and again.is_for(self):",
        ":",
        STREAM,
    ),
)
