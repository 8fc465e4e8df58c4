/*
 * The first and only program of a VM that the tests boot: no shell, no fork, a few system calls an order, so that it
 * is up in seconds under an emulator in an emulator.
 *
 * On a VM's disk it mounts what it needs, says "VM up" and carries out orders, a line each, from the console. To every
 * order it answers with one line that begins with "VM ". In an initramfs, which has /modules, it loads those, says
 * "VM waits", and there the VM is saved; on the first line that it is sent it mounts /dev/vda and goes on as its /init.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#define BLOCK 65536

static unsigned char block[BLOCK];
static uint64_t noise_state;
static uint32_t md5_sines[64];

static int failed(const char *what)
{
	printf("VM failed %s: %s\n", what, strerror(errno));
	return -1;
}

/* The console without echo: what is read here does not stand among the answers. */
static void console(void)
{
	struct termios settings;
	int fd = open("/dev/console", O_RDWR);

	if (fd >= 0) {
		dup2(fd, 0);
		dup2(fd, 1);
		dup2(fd, 2);
		if (fd > 2)
			close(fd);
	}
	if (tcgetattr(0, &settings) == 0) {
		settings.c_lflag &= ~(ECHO | ECHOE | ECHOK | ECHONL);
		tcsetattr(0, TCSANOW, &settings);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
}

/* The next line that is not empty, without its end. Never returns when there are no more. */
static void order(char *line, int size)
{
	do {
		if (!fgets(line, size, stdin)) {
			clearerr(stdin);
			usleep(100000);
			line[0] = 0;
		}
		line[strcspn(line, "\r\n")] = 0;
	} while (!line[0]);
}

/* One block of 64 bytes, by RFC 1321. */
static void md5_block(uint32_t state[4], const unsigned char *at)
{
	static const unsigned char turns[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
	uint32_t a = state[0], b = state[1], c = state[2], d = state[3], words[16];

	memcpy(words, at, sizeof words);
	for (int i = 0; i < 64; i++) {
		uint32_t f, turn = turns[i / 16][i % 4];
		int word;

		switch (i / 16) {
		case 0: f = (b & c) | (~b & d); word = i; break;
		case 1: f = (d & b) | (~d & c); word = (5 * i + 1) % 16; break;
		case 2: f = b ^ c ^ d; word = (3 * i + 5) % 16; break;
		default: f = c ^ (b | ~d); word = 7 * i % 16;
		}
		f += a + md5_sines[i] + words[word];
		a = d;
		d = c;
		c = b;
		b += f << turn | f >> (32 - turn);
	}
	state[0] += a;
	state[1] += b;
	state[2] += c;
	state[3] += d;
}

/* What md5sum(1) says of a file of whole blocks of 64 bytes. */
static void checksum(const char *path)
{
	uint32_t state[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
	unsigned char last[64] = {0x80};
	uint64_t bytes = 0, bits;
	ssize_t length, i;
	int fd = open(path, O_RDONLY);

	if (fd < 0) {
		failed(path);
		return;
	}
	/* From the disk, where that can be had, and not from this kernel's memory. */
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	while ((length = read(fd, block, BLOCK)) > 0 && length % 64 == 0) {
		for (i = 0; i < length; i += 64)
			md5_block(state, block + i);
		bytes += length;
	}
	if (length != 0) {
		failed(path);
		close(fd);
		return;
	}
	close(fd);
	bits = bytes * 8;
	memcpy(last + 56, &bits, 8);
	md5_block(state, last);
	printf("VM sum ");
	for (i = 0; i < 16; i++)
		printf("%02x", ((unsigned char *)state)[i]);
	printf(" %s\n", path);
}

static void md5_prepare(void)
{
	for (int i = 0; i < 64; i++)
		md5_sines[i] = (uint32_t)(long long)(fabs(sin(i + 1)) * 4294967296.0);
}

/* So many blocks of what was never written before, to the disk. */
static int fill(const char *path, int blocks)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd < 0)
		return failed(path);
	while (blocks-- > 0) {
		for (int i = 0; i < BLOCK; i += 8) {
			noise_state ^= noise_state << 13;
			noise_state ^= noise_state >> 7;
			noise_state ^= noise_state << 17;
			memcpy(block + i, &noise_state, 8);
		}
		if (write(fd, block, BLOCK) != BLOCK) {
			failed("write");
			close(fd);
			return -1;
		}
	}
	if (fsync(fd) < 0) {
		failed("fsync");
		close(fd);
		return -1;
	}
	close(fd);
	return 0;
}

static void own(const char *name)
{
	char path[128];
	int fd;

	for (const char *c = name; *c; c++)
		noise_state = noise_state * 1000003 + *c;
	snprintf(path, sizeof path, "/etc/own-%s", name);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || dprintf(fd, "%s was here\n", name) < 0 || fsync(fd) < 0)
		failed(path);
	else
		printf("VM owns %s\n", path);
	if (fd >= 0)
		close(fd);
}

static void list(const char *path)
{
	struct dirent *entry;
	DIR *dir = opendir(path);

	if (!dir) {
		failed(path);
		return;
	}
	printf("VM list");
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			printf(" %s", entry->d_name);
	printf("\n");
	closedir(dir);
}

static void trim(void)
{
	struct fstrim_range all = {.len = UINT64_MAX};
	int fd = open("/", O_RDONLY);

	sync();
	if (fd < 0 || ioctl(fd, FITRIM, &all) < 0)
		failed("FITRIM");
	else
		printf("VM trimmed %llu\n", (unsigned long long)all.len);
	if (fd >= 0)
		close(fd);
}

static void drop_caches(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

	sync();
	if (fd < 0 || write(fd, "3", 1) != 1)
		failed("drop_caches");
	else
		printf("VM dropped\n");
	if (fd >= 0)
		close(fd);
}

/* Rounds until the VM is killed, each told when it is on the disk. */
static void forever(void)
{
	for (unsigned long round = 1; fill(round % 2 ? "/data/odd" : "/data/even", 8) == 0; round++)
		printf("VM round %lu\n", round);
}

static void end(int how)
{
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
		failed("remount");
	sync();
	printf("VM ends\n");
	tcdrain(1);
	reboot(how);
}

static void carry_out(char *line)
{
	char *save, *verb = strtok_r(line, " ", &save), *path = strtok_r(NULL, " ", &save);
	char *number = strtok_r(NULL, " ", &save);

	if (!verb)
		return;
	if (!strcmp(verb, "sum") && path)
		checksum(path);
	else if (!strcmp(verb, "fill") && path && number) {
		if (fill(path, atoi(number)) == 0)
			printf("VM filled %s\n", path);
	} else if (!strcmp(verb, "own") && path)
		own(path);
	else if (!strcmp(verb, "list") && path)
		list(path);
	else if (!strcmp(verb, "unlink") && path) {
		if (unlink(path) < 0)
			failed(path);
		else
			printf("VM unlinked %s\n", path);
		sync();
	} else if (!strcmp(verb, "trim"))
		trim();
	else if (!strcmp(verb, "drop"))
		drop_caches();
	else if (!strcmp(verb, "forever"))
		forever();
	else if (!strcmp(verb, "halt"))
		end(RB_POWER_OFF);
	else if (!strcmp(verb, "reset"))
		end(RB_AUTOBOOT);
	else
		printf("VM does not know %s\n", verb);
}

static void insert(const char *list)
{
	char path[256];
	FILE *file = fopen(list, "r");

	while (file && fgets(path, sizeof path, file)) {
		int fd;

		path[strcspn(path, "\n")] = 0;
		fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
			failed(path);
		if (fd >= 0)
			close(fd);
	}
	if (file)
		fclose(file);
}

/* In an initramfs: up to where the VM is saved, and from there into its disk. */
static void from_initramfs(void)
{
	char line[256];

	mkdir("/dev", 0755);
	mkdir("/disk", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	console();
	insert("/modules");
	printf("VM waits\n");
	order(line, sizeof line);
	if (mount("/dev/vda", "/disk", "ext4", 0, NULL) < 0)
		failed("mount");
	if (chdir("/disk") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		failed("move");
	execl("/init", "/init", NULL);
	failed("exec");
	for (;;)
		pause();
}

int main(void)
{
	char line[256];

	if (access("/modules", F_OK) == 0)
		from_initramfs();
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	console();
	md5_prepare();
	noise_state = 88172645463325252ULL;
	printf("VM up\n");
	for (;;) {
		order(line, sizeof line);
		carry_out(line);
	}
}
