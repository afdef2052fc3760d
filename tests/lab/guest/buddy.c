// SPDX-License-Identifier: Apache-2.0
/*
 * buddy [BIT]: writes one bit for each page frame, from 0 up, to standard output: 1 when /proc/kpageflags calls it BUDDY
 * (or has another BIT, 0 to 63). Bit 0 of the first byte is page frame 0.
 *
 * This is the guest's own truth about its free memory. The kernel flags every page of a free block; pages
 * resting in per-CPU lists are not in the buddy lists and carry no flag. A frame that does not exist is 0.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define KPF_BUDDY 10
#define BATCH 8192

int main(int argc, char **argv)
{
	static uint64_t flags[BATCH];
	int bit = argc > 1 ? atoi(argv[1]) : KPF_BUDDY;
	int fd = open("/proc/kpageflags", O_RDONLY);
	ssize_t n;

	if (fd < 0) {
		perror("/proc/kpageflags");
		return 1;
	}
	while ((n = read(fd, flags, sizeof(flags))) > 0) {
		for (ssize_t i = n / 8; i < BATCH; i++)
			flags[i] = 0;
		for (ssize_t i = 0; i < (n / 8 + 7) / 8; i++) {
			int byte = 0;

			for (int k = 0; k < 8; k++)
				byte |= (int)(flags[i * 8 + k] >> bit & 1) << k;
			putchar(byte);
		}
	}
	return n < 0 || fflush(stdout) != 0;
}
