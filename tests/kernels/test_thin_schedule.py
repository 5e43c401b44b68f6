"""Every share of `h` is summed once, and a cluster waits only for those that need not wait for it."""

import itertools

from lora_jax.kernels.thin_schedule import ThinSchedule

SIZES = list(itertools.product((1, 3, 8, 32, 66, 67, 200), (1, 2, 16, 56), (5, 16, 64, 224), (57, 66)))


def schedules():
    for rows, columns, steps, clusters in SIZES:
        yield ThinSchedule(rows, columns, steps, clusters, stages=4)


def test_first_tiles_fill_the_clusters_at_most_once_or_are_one_column():
    for s in schedules():
        assert 1 <= s.first_columns <= s.columns and s.firsts <= s.tiles
        assert s.one_first_each or s.first_columns == 1
        # One column more would be too many, or there is none, or its part of K would be shorter than the ring.
        more = s.first_columns + 1
        assert s.rows * more > s.clusters or more > s.columns or s.steps // more < s.stages


def test_shares_cover_k_once():
    for s in schedules():
        bounds = [s.share(column) for column in range(s.first_columns)]
        assert bounds[0][0] == 0 and bounds[-1][1] == s.steps
        assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
        assert all(hi - lo >= s.stages for lo, hi in bounds)


def test_no_cluster_waits_for_itself():
    """Simulated tile by tile: a first tile ends when all shares of its rows are there, a later when all of `h` is."""
    for s in schedules():
        queues = [list(range(at, s.tiles, s.clusters)) for at in range(s.clusters)]
        # Each cluster writes the share of its current first tile before it waits for the others'.
        written, finished = set(), set()
        progress = True
        while progress and any(queues):
            progress = False
            for queue in queues:
                while queue:
                    tile = queue[0]
                    if tile < s.firsts:
                        written.add(tile)
                        needed = {column * s.rows + tile % s.rows for column in range(s.first_columns)}
                        if not needed <= written:
                            break
                        finished.add(tile)
                    elif len(finished) < s.firsts:
                        break
                    queue.pop(0)
                    progress = True
        assert not any(queues), s
