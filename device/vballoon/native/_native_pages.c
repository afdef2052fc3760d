// SPDX-License-Identifier: Apache-2.0
/* Page ranges: sorting and merging them, whole pages of byte ranges, ranges of a file. */
#include "_native.h"

#include <errno.h>
#include <fcntl.h>

static const uint64_t FILE_MAX = 1ULL << 62; /* a sum of two of them fits */
enum { FEW = 24, DIGIT = 11, BUCKETS = 1 << DIGIT };

static void sort_few(uint64_t *start, uint64_t *end, Py_ssize_t n)
{
	for (Py_ssize_t i = 1; i < n; i++) {
		uint64_t s = start[i], e = end[i];
		Py_ssize_t k = i;

		for (; k && start[k - 1] > s; k--) {
			start[k] = start[k - 1];
			end[k] = end[k - 1];
		}
		start[k] = s;
		end[k] = e;
	}
}

/* One pass of a radix sort, by the digit at bit *shift*. */
static void sort_digit(const uint64_t *s, const uint64_t *e, uint64_t *to_s, uint64_t *to_e,
		       Py_ssize_t n, int shift)
{
	uint32_t place[BUCKETS] = { 0 }, sum = 0;

	for (Py_ssize_t i = 0; i < n; i++)
		place[s[i] >> shift & (BUCKETS - 1)]++;
	for (int d = 0; d < BUCKETS; d++) {
		uint32_t count = place[d];

		place[d] = sum;
		sum += count;
	}
	for (Py_ssize_t i = 0; i < n; i++) {
		uint32_t at = place[s[i] >> shift & (BUCKETS - 1)]++;

		to_s[at] = s[i];
		to_e[at] = e[i];
	}
}

/* By start; a digit that all starts have in common costs nothing. */
static bool sort_ranges(uint64_t *start, uint64_t *end, Py_ssize_t n)
{
	uint64_t differ = 0, *from[2] = { start, end }, *to[2];

	if (n <= FEW) {
		sort_few(start, end, n);
		return true;
	}
	uint64_t *room = n < UINT32_MAX ? PyMem_Malloc((size_t)n * 16) : NULL;
	if (!room)
		return false;
	to[0] = room;
	to[1] = room + n;
	for (Py_ssize_t i = 1; i < n; i++)
		differ |= start[i] ^ start[0];
	int shift = differ ? __builtin_ctzll(differ) : 64;
	while (shift < 64 && differ >> shift) {
		sort_digit(from[0], from[1], to[0], to[1], n, shift);
		for (int i = 0; i < 2; i++) {
			uint64_t *swap = from[i];

			from[i] = to[i];
			to[i] = swap;
		}
		shift += DIGIT;
	}
	if (from[0] != start) {
		memcpy(start, from[0], (size_t)n * 8);
		memcpy(end, from[1], (size_t)n * 8);
	}
	PyMem_Free(room);
	return true;
}

Py_ssize_t merge_ranges(uint64_t *start, uint64_t *end, Py_ssize_t n)
{
	Py_ssize_t found = 0, i;

	for (i = 1; i < n && start[i - 1] <= start[i]; i++)
		;
	if (i < n && !sort_ranges(start, end, n))
		return -1;
	if (!n)
		return 0;
	uint64_t low = start[0], high = end[0];
	for (i = 1; i < n; i++) {
		if (start[i] <= high) {
			high = end[i] > high ? end[i] : high;
			continue;
		}
		start[found] = low;
		end[found++] = high;
		low = start[i];
		high = end[i];
	}
	start[found] = low;
	end[found++] = high;
	return found;
}

/* Ranges in *out* of which there are *n*; how many when merged. */
static PyObject *merged(struct args *a, const struct array *out, Py_ssize_t n)
{
	n = merge_ranges(out[0].data, out[1].data, n);
	release(a);
	return n < 0 ? PyErr_NoMemory() : PyLong_FromSsize_t(n);
}

/* merge(start, end, out_start, out_end) -> ranges */
CALLED(native_merge)
{
	struct args a = { .count = 0 };
	struct array in[4];
	Py_ssize_t n = 0;

	(void)module;
	if (nargs != 4 || !take_arrays(&a, args, "qqQQ", in))
		return failed(&a, "merge takes 4 arguments");
	if (in[0].n != in[1].n || in[2].n < in[0].n || in[3].n < in[0].n)
		return failed(&a, "columns of different sizes");
	const uint64_t *from_start = in[0].data, *from_end = in[1].data;
	uint64_t *start = in[2].data, *end = in[3].data;
	for (Py_ssize_t i = 0; i < in[0].n; i++) {
		uint64_t s = from_start[i], e = from_end[i];

		start[n] = s;
		end[n] = e;
		n += s < e;
	}
	return merged(&a, &in[2], n);
}

/*
 * blocks(addr, len, wanted, out_start, out_end) -> (ranges, pages, bad)
 *
 * The whole pages in each [addr, addr + len) that is wanted, merged, and how many they are.  Bad
 * are ranges that do not begin and end on a page, and those that are not wanted.
 */
CALLED(native_blocks)
{
	struct args a = { .count = 0 };
	struct array in[5];
	uint64_t bad = 0, pages = 0;
	Py_ssize_t n = 0;

	(void)module;
	if (nargs != 5 || !take_arrays(&a, args, "qibQQ", in))
		return failed(&a, "blocks takes 5 arguments");
	for (int k = 1; k < 5; k++)
		if (k < 3 ? in[k].n != in[0].n : in[k].n < in[0].n)
			return failed(&a, "columns of different sizes");
	const uint64_t *addr = in[0].data;
	const uint32_t *len = in[1].data;
	const uint8_t *wanted = in[2].data;
	uint64_t *start = in[3].data, *end = in[4].data;
	for (Py_ssize_t i = 0; i < in[0].n; i++) {
		uint64_t begin = addr[i], after = begin + len[i];
		uint64_t first = (begin >> 12) + !!(begin & 4095), last = after >> 12;

		bad += !wanted[i] || (begin | after) & 4095;
		start[n] = first;
		end[n] = last;
		n += wanted[i] && first < last;
	}
	n = merge_ranges(start, end, n);
	for (Py_ssize_t i = 0; i < n; i++)
		pages += end[i] - start[i];
	release(&a);
	if (n < 0)
		return PyErr_NoMemory();
	return Py_BuildValue("nKK", n, (unsigned long long)pages, (unsigned long long)bad);
}

/*
 * in_file(start, end, out_start, out_end, (low, high, offset, unit)) -> (ranges, bytes)
 *
 * What of merged ranges of bytes is in [low, high), a region that starts at *offset* of its file:
 * the whole units of the file in it.
 */
CALLED(native_in_file)
{
	struct args a = { .count = 0 };
	struct array in[4];
	unsigned long long low, high, offset, unit, bytes = 0;
	Py_ssize_t n = 0;

	(void)module;
	if (nargs != 5 || !take_arrays(&a, args, "qqQQ", in) ||
	    !PyArg_ParseTuple(args[4], "KKKK", &low, &high, &offset, &unit))
		return failed(&a, "in_file takes 5 arguments");
	if (in[0].n != in[1].n || in[2].n < in[0].n || in[3].n < in[0].n || !unit ||
	    unit & (unit - 1) || unit > FILE_MAX || low > high || high - low > FILE_MAX ||
	    offset > FILE_MAX)
		return failed(&a, "columns or a region that do not fit");
	const uint64_t *start = in[0].data, *end = in[1].data;
	uint64_t *first = in[2].data, *last = in[3].data;
	for (Py_ssize_t i = 0; i < in[0].n; i++) {
		uint64_t s = start[i] > low ? start[i] : low, e = end[i] < high ? end[i] : high;

		if (s >= e)
			continue;
		first[n] = (s - low + offset + unit - 1) & ~(unit - 1);
		last[n] = (e - low + offset) & ~(unit - 1);
		if (first[n] >= last[n])
			continue;
		bytes += last[n] - first[n];
		n++;
	}
	release(&a);
	return Py_BuildValue("nK", n, bytes);
}

/*
 * punch(fd, start, end) -> (ranges done, errno)
 *
 * Free the byte ranges of a file, one after the other, until one cannot be.
 */
CALLED(native_punch)
{
	struct args a = { .count = 0 };
	struct array in[2];
	Py_ssize_t i;
	int error = 0;

	(void)module;
	if (nargs != 3 || !take_arrays(&a, args + 1, "qq", in))
		return failed(&a, "punch takes 3 arguments");
	int fd = (int)PyLong_AsLong(args[0]);
	const uint64_t *start = in[0].data, *end = in[1].data;
	if (PyErr_Occurred() || in[0].n != in[1].n)
		return failed(&a, "columns of different sizes");
	Py_BEGIN_ALLOW_THREADS
	for (i = 0; i < in[0].n && !error; i++) {
		do {
			error = fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
					  (off_t)start[i], (off_t)(end[i] - start[i])) ? errno : 0;
		} while (error == EINTR);
	}
	Py_END_ALLOW_THREADS
	release(&a);
	return Py_BuildValue("ni", error ? i - 1 : i, error);
}
