// SPDX-License-Identifier: Apache-2.0
/*
 * Signal an eventfd of another process without ever blocking.
 *
 * O_NONBLOCK is a flag of the open file, so the process that sent us the eventfd can clear it at
 * any time and fill the counter.  A write(2) would then sleep until the counter is read.  Linux AIO signals an
 * eventfd from inside the kernel (IOCB_FLAG_RESFD) when a request completes, which saturates the
 * counter instead of waiting.  The request is a read of no bytes from a memfd of our own.  It completes
 * within io_submit(2).
 */
#include "_guard.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EVENTS = 64 };

static aio_context_t context;
static int source = -1;
static pid_t owner;  /* an AIO context does not survive fork(2) */
static int finished; /* completions that have not been collected */

static int open_context(void)
{
	if (context && owner == getpid())
		return 0;
	context = 0;
	finished = 0;
	if (source < 0) {
		source = memfd_create("vballoon-signal", MFD_CLOEXEC);
		if (source < 0)
			return -1;
	}
	if (syscall(SYS_io_setup, EVENTS, &context) < 0)
		return -1;
	owner = getpid();
	return 0;
}

static void collect(void)
{
	struct io_event events[EVENTS];
	struct timespec now = { 0, 0 };
	long got = syscall(SYS_io_getevents, context, 0L, (long)EVENTS, events, &now);

	if (got > 0)
		finished -= (int)got;
}

/* signal(fd) -> int: add one to an eventfd.  Return 0 or an errno (EINVAL: not an eventfd). */
CALLED(native_signal)
{
	static char byte;
	struct iocb request, *list = &request;

	(void)module;
	if (nargs != 1) {
		PyErr_SetString(PyExc_TypeError, "signal(fd)");
		return NULL;
	}
	long fd = PyLong_AsLong(args[0]);

	if (fd == -1 && PyErr_Occurred())
		return NULL;
	if (open_context() < 0)
		return PyLong_FromLong(errno);
	if (finished >= EVENTS / 2)
		collect();
	memset(&request, 0, sizeof(request));
	request.aio_lio_opcode = IOCB_CMD_PREAD;
	request.aio_fildes = (uint32_t)source;
	request.aio_buf = (uintptr_t)&byte;
	request.aio_nbytes = 1; /* the file is empty: nothing is read */
	request.aio_flags = IOCB_FLAG_RESFD;
	request.aio_resfd = (uint32_t)fd;
	long taken = syscall(SYS_io_submit, context, 1L, &list);

	if (taken != 1)
		return PyLong_FromLong(taken < 0 ? errno : EAGAIN);
	finished++;
	return PyLong_FromLong(0);
}
