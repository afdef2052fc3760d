// SPDX-License-Identifier: Apache-2.0
/*
 * memhog MIB [random|pattern] [SEED]: holds MIB mebibytes of anonymous memory with known content.
 *
 * It reads one command per line from standard input and answers each with one line:
 *   check     "good" or "bad <first wrong page>"
 *   free      gives everything back, "freed"
 *   fragment  gives every second page back, "fragmented": free memory in order 0, with neighbours in use;
 *             check then looks at the pages that are left
 *   refill    writes it all again with the next seed, "filled"
 * "filled" is printed when the memory is ready. It lives until the end of its input, so a test usually feeds it from a
 * FIFO; with no input at all (</dev/null) it fills, frees and ends.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t next(uint64_t *state)
{
	uint64_t x = *state += 0x9e3779b97f4a7c15;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

/* A page's content follows from the seed and its number, so a page that moved, vanished or got stale is seen. */
static void fill_page(uint64_t *page, size_t number, uint64_t seed, int random)
{
	uint64_t state = seed * 0x100000001b3 + number;

	for (size_t i = 0; i < WORDS; i++)
		page[i] = random ? next(&state) : state + i;
}

static void fill(uint64_t *memory, size_t pages, uint64_t seed, int random)
{
	for (size_t i = 0; i < pages; i++)
		fill_page(memory + i * WORDS, i, seed, random);
	puts("filled");
	fflush(stdout);
}

static void check(uint64_t *memory, size_t pages, uint64_t seed, int random, size_t step)
{
	static uint64_t wanted[WORDS];
	size_t bad = pages;

	for (size_t i = 0; i < pages && bad == pages; i += step) {
		fill_page(wanted, i, seed, random);
		if (memcmp(wanted, memory + i * WORDS, PAGE))
			bad = i;
	}
	if (bad == pages)
		puts("good");
	else
		printf("bad %zu\n", bad);
	fflush(stdout);
}

static void give_back(uint64_t *memory, size_t pages, size_t step)
{
	if (step == 1)
		madvise(memory, pages * PAGE, MADV_DONTNEED);
	else
		for (size_t i = 1; i < pages; i += step)
			madvise(memory + i * WORDS, PAGE, MADV_DONTNEED);
	puts(step == 1 ? "freed" : "fragmented");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	size_t pages = argc > 1 ? strtoul(argv[1], NULL, 0) * 256 : 0;
	int random = !(argc > 2 && !strcmp(argv[2], "pattern"));
	uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
	size_t step = 1;
	char command[32];
	uint64_t *memory;

	if (!pages)
		return 2;
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE); /* or "fragment" would only split page tables */
	fill(memory, pages, seed, random);
	while (fgets(command, sizeof(command), stdin)) {
		if (!strncmp(command, "check", 5)) {
			check(memory, pages, seed, random, step);
		} else if (!strncmp(command, "fragment", 8)) {
			give_back(memory, pages, step = 2);
		} else if (!strncmp(command, "free", 4)) {
			give_back(memory, pages, 1);
		} else if (!strncmp(command, "refill", 6)) {
			step = 1;
			fill(memory, pages, ++seed, random);
		}
	}
	return 0;
}
