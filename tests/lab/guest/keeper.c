// SPDX-License-Identifier: Apache-2.0
/*
 * keeper make FOLDER MIB [SEED]: fill FOLDER (on tmpfs, or in the page cache) with files of known content.
 * keeper check FOLDER: read all files and print "good <files>" or "bad <file> <offset>".  The exit status is 1
 * if a file is bad or there is none.
 *
 * The name of a file is its seed.  Its size (1 byte to 4 MiB) and its content are computed from the seed.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 65536

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static size_t size_of(uint64_t seed)
{
	return 1 + mix(seed) % (4 << 20);
}

static void content(uint64_t *block, uint64_t seed, size_t offset)
{
	for (size_t i = 0; i < BLOCK / 8; i++)
		block[i] = mix(seed * 0x100000001b3 + offset + i * 8);
}

static int make_file(const char *folder, uint64_t seed)
{
	size_t bytes = size_of(seed);
	static uint64_t block[BLOCK / 8];
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "%s/%016llx", folder, (unsigned long long)seed);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd < 0)
		return -1;
	for (size_t at = 0; at < bytes; at += BLOCK) {
		size_t part = bytes - at < BLOCK ? bytes - at : BLOCK;

		content(block, seed, at);
		if (write(fd, block, part) != (ssize_t)part)
			return -1;
	}
	return close(fd);
}

static int make(const char *folder, size_t left, uint64_t seed)
{
	mkdir(folder, 0700);
	while (left) {
		uint64_t name = mix(seed++);

		if (make_file(folder, name)) {
			perror(folder);
			return 1;
		}
		left -= size_of(name) < left ? size_of(name) : left;
	}
	return 0;
}

static int check_file(const char *folder, const char *name)
{
	static uint64_t have[BLOCK / 8], wanted[BLOCK / 8];
	uint64_t seed = strtoull(name, NULL, 16);
	char path[512];
	size_t at = 0;
	ssize_t n = 0;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_RDONLY);
	while (fd >= 0 && (n = read(fd, have, BLOCK)) > 0) {
		content(wanted, seed, at);
		if (memcmp(have, wanted, n)) {
			printf("bad %s %zu\n", name, at);
			return 1;
		}
		at += n;
	}
	if (fd < 0 || n < 0 || at != size_of(seed)) {
		printf("bad %s %zu\n", name, at);
		return 1;
	}
	return close(fd);
}

static int check(const char *folder)
{
	DIR *dir = opendir(folder);
	struct dirent *entry;
	int files = 0;

	while (dir && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		if (check_file(folder, entry->d_name))
			return 1;
		files++;
	}
	printf("good %d\n", files);
	return files == 0;
}

int main(int argc, char **argv)
{
	if (argc > 3 && !strcmp(argv[1], "make"))
		return make(argv[2], strtoul(argv[3], NULL, 0) << 20, argc > 4 ? strtoull(argv[4], NULL, 0) : 1);
	if (argc > 2 && !strcmp(argv[1], "check"))
		return check(argv[2]);
	return 2;
}
