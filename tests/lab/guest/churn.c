// SPDX-License-Identifier: Apache-2.0
/*
 * churn MIB [SECONDS] [SEED]: keeps a guest's allocator busy and checks every byte that it reads back.
 *
 * It holds a set of mappings of 4 KiB to 4 MiB that sum to at most MIB; each step frees one (after checking it) and makes
 * another, filled with a pattern of its own. Ends after SECONDS (0: on SIGTERM) with "churn: <steps> steps, <bad> bad";
 * exit status 1 if any byte was wrong.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define SLOTS 512

struct slot {
	uint64_t *memory;
	size_t bytes;
	uint64_t seed;
};

static struct slot slots[SLOTS];
static volatile sig_atomic_t stop;

static void on_term(int signal)
{
	(void)signal;
	stop = 1;
}

static uint64_t next(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static void fill(const struct slot *slot)
{
	uint64_t state = slot->seed;

	for (size_t i = 0; i < slot->bytes / 8; i++)
		slot->memory[i] = state += 0x9e3779b97f4a7c15;
}

static int is_bad(const struct slot *slot)
{
	uint64_t state = slot->seed;

	for (size_t i = 0; i < slot->bytes / 8; i++)
		if (slot->memory[i] != (state += 0x9e3779b97f4a7c15))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	size_t limit = (argc > 1 ? strtoul(argv[1], NULL, 0) : 64) << 20, held = 0;
	long seconds = argc > 2 ? strtol(argv[2], NULL, 0) : 0;
	uint64_t state = argc > 3 ? strtoull(argv[3], NULL, 0) | 1 : 88172645463325252ULL;
	unsigned long steps = 0, bad = 0;
	time_t end = time(NULL) + seconds;

	signal(SIGTERM, on_term);
	while (!stop && (!seconds || time(NULL) < end)) {
		struct slot *slot = &slots[next(&state) % SLOTS];

		steps++;
		if (slot->memory) {
			bad += is_bad(slot);
			munmap(slot->memory, slot->bytes);
			held -= slot->bytes;
			slot->memory = NULL;
		}
		slot->bytes = (size_t)4096 << (next(&state) % 11);
		slot->seed = next(&state);
		if (held + slot->bytes > limit)
			continue;
		slot->memory = mmap(NULL, slot->bytes, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (slot->memory == MAP_FAILED) {
			slot->memory = NULL;
			continue;
		}
		held += slot->bytes;
		fill(slot);
	}
	printf("churn: %lu steps, %lu bad\n", steps, bad);
	return bad != 0;
}
