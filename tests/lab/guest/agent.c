// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's first process: mounts what a small Linux needs, then serves the host's script channel.
 *
 * The channel is a raw serial line (the second ISA port), because its driver is built into every kernel and survives
 * whatever a test does to PCI and virtio. Requests are one line, some followed by bytes:
 *
 *     S <n>             n bytes are appended to the next script; answered "A\n"
 *     I <n>             n bytes are appended to the next script's standard input; answered "A\n"
 *     R <id> <seconds>  run the script with sh; answered by any number of
 *                       "O <id> <n>\n" + n bytes of output, "E <id> <n>\n" + n bytes of error output,
 *                       then "X <id> <status>\n" (status 128 + signal when killed, 124 when it ran out of time)
 *     H                 answered "H <boot id>\n"
 *
 * A new "H" while a script runs is answered only when the script is over: there is one thread of control.
 * The agent never allocates after its start and is locked in memory, so it answers in a guest without free memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 4096

static int line; /* the serial port */
static char script_path[] = "/run/script", input_path[] = "/run/input";

static void die(const char *what)
{
	dprintf(2, "agent: %s: %s\n", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	_exit(1);
}

static void write_all(int fd, const char *bytes, size_t left)
{
	while (left) {
		ssize_t n = write(fd, bytes, left);

		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n <= 0)
			return;
		bytes += n;
		left -= n;
	}
}

static void say(const char *format, ...)
{
	char text[128];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	write_all(line, text, n);
}

static void read_exactly(char *bytes, size_t left)
{
	while (left) {
		ssize_t n = read(line, bytes, left);

		if (n < 0 && errno != EINTR && errno != EAGAIN)
			die("read");
		if (n > 0) {
			bytes += n;
			left -= n;
		}
	}
}

static void read_line(char *text, size_t size)
{
	size_t n = 0;

	while (n + 1 < size) {
		read_exactly(text + n, 1);
		if (text[n] == '\n')
			break;
		n++;
	}
	text[n] = 0;
}

/* Append n bytes from the line to a file; acknowledged, so the host never outruns the port's buffer. */
static void receive(const char *path, size_t n)
{
	static char bytes[CHUNK];
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0700);

	while (n) {
		size_t part = n < CHUNK ? n : CHUNK;

		read_exactly(bytes, part);
		if (fd >= 0)
			write_all(fd, bytes, part);
		n -= part;
	}
	if (fd >= 0)
		close(fd);
	say("A\n");
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}


static void set_oom(pid_t pid, const char *value)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/oom_score_adj", (int)pid);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		write_all(fd, value, strlen(value));
		close(fd);
	}
}

static pid_t start(int out[2], int err[2])
{
	pid_t pid = fork();

	if (pid)
		return pid;
	setsid();
	set_oom(getpid(), "0");
	int in = open(input_path, O_RDONLY);

	dup2(in >= 0 ? in : open("/dev/null", O_RDONLY), 0);
	dup2(out[1], 1);
	dup2(err[1], 2);
	execl("/bin/sh", "sh", script_path, (char *)NULL);
	_exit(127);
}

/* Pass on what a pipe holds; false at its end. */
static int forward(int fd, char kind, long id)
{
	static char bytes[CHUNK];
	ssize_t n = read(fd, bytes, sizeof(bytes));

	if (n <= 0)
		return n < 0 && (errno == EINTR || errno == EAGAIN);
	say("%c %ld %zd\n", kind, id, n);
	write_all(line, bytes, n);
	return 1;
}

/* The script is over when its shell is; a load that it left in the background may keep the pipes open. */
static int wait_for(pid_t pid, int out, int err, long id, int64_t deadline)
{
	int status = 0, open_out = 1, open_err = 1, over = 0, late = 0;

	for (;;) {
		struct pollfd fds[2] = { { open_out ? out : -1, POLLIN, 0 },
					 { open_err ? err : -1, POLLIN, 0 } };
		int n = poll(fds, 2, over ? 0 : open_out || open_err ? 20 : 1);

		if (n > 0) {
			if (fds[0].revents)
				open_out = forward(out, 'O', id);
			if (fds[1].revents)
				open_err = forward(err, 'E', id);
			continue;
		}
		if (over)
			break;
		if (waitpid(pid, &status, WNOHANG) == pid)
			over = 1;
		else if (!late && now_ms() > deadline) {
			late = 1;
			kill(-pid, SIGKILL);
		}
	}
	if (late)
		return 124;
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void run(long id, long seconds)
{
	int out[2], err[2], status;
	pid_t pid;

	if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) {
		say("X %ld 126\n", id);
		return;
	}
	pid = start(out, err);
	close(out[1]);
	close(err[1]);
	status = pid < 0 ? 126 : wait_for(pid, out[0], err[0], id, now_ms() + seconds * 1000);
	close(out[0]);
	close(err[0]);
	unlink(script_path);
	unlink(input_path);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	say("X %ld %d\n", id, status);
}

static void mount_all(void)
{
	static const char *const mounts[][2] = {
		{ "proc", "/proc" }, { "sysfs", "/sys" }, { "devtmpfs", "/dev" }, { "tmpfs", "/run" },
		{ "tmpfs", "/tmp" }, { "debugfs", "/sys/kernel/debug" }, { "tracefs", "/sys/kernel/tracing" },
	};

	for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++)
		mount(mounts[i][0], mounts[i][1], mounts[i][0], 0, NULL);
	mkdir("/dev/shm", 01777);
	mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=90%");
	mount(NULL, "/tmp", NULL, MS_REMOUNT, "size=90%");
}

static void open_line(void)
{
	struct termios t;

	line = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (line < 0 || tcgetattr(line, &t))
		die("/dev/ttyS1");
	cfmakeraw(&t);
	t.c_cflag |= CLOCAL | CREAD;
	t.c_cc[VMIN] = 1;
	t.c_cc[VTIME] = 0;
	cfsetspeed(&t, B115200);
	tcsetattr(line, TCSANOW, &t);
}

static void boot_id(char *text, size_t size)
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[n > 0 ? n - 1 : 0] = 0;
}

static void serve(void)
{
	char request[128], id[64];
	long a, b;

	boot_id(id, sizeof(id));
	say("\nH %s\n", id); /* the host waits for this line: the guest is up */
	for (;;) {
		read_line(request, sizeof(request));
		if (sscanf(request, "R %ld %ld", &a, &b) == 2)
			run(a, b);
		else if (sscanf(request, "S %ld", &a) == 1)
			receive(script_path, a);
		else if (sscanf(request, "I %ld", &a) == 1)
			receive(input_path, a);
		else if (request[0] == 'H')
			say("H %s\n", id);
		else
			say("? %s\n", request);
	}
}

int main(void)
{
	mount_all();
	setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin:/lab", 1);
	setenv("HOME", "/tmp", 1);
	signal(SIGPIPE, SIG_IGN);
	set_oom(getpid(), "-1000");
	mlockall(MCL_CURRENT);
	open_line();
	serve();
	return 0;
}
