// SPDX-License-Identifier: Apache-2.0
/*
 * buddy: writes the pages that /proc/kpageflags calls BUDDY to standard output, as ranges.
 *
 * Each range is two little-endian 64-bit words, first page frame number and count, ascending and merged: the guest's own
 * truth about its free memory. The kernel flags every page of a free block, but pages resting in per-CPU lists are not in the
 * buddy lists and carry no flag. "buddy FLAG" looks for another bit of kpageflags (0 to 63) instead.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define KPF_BUDDY 10
#define BATCH 8192

static void put(uint64_t first, uint64_t end)
{
	uint64_t range[2] = { first, end - first };

	if (end > first)
		fwrite(range, sizeof(range), 1, stdout);
}

int main(int argc, char **argv)
{
	static uint64_t flags[BATCH];
	int bit = argc > 1 ? atoi(argv[1]) : KPF_BUDDY;
	int fd = open("/proc/kpageflags", O_RDONLY);
	uint64_t pfn = 0, first = 0;
	int inside = 0;
	ssize_t n;

	if (fd < 0) {
		perror("/proc/kpageflags");
		return 1;
	}
	while ((n = read(fd, flags, sizeof(flags))) > 0)
		for (ssize_t i = 0; i < n / 8; i++, pfn++) {
			int set = flags[i] >> bit & 1;

			if (set && !inside)
				first = pfn;
			else if (!set && inside)
				put(first, pfn);
			inside = set;
		}
	if (inside)
		put(first, pfn);
	return fflush(stdout) != 0;
}
