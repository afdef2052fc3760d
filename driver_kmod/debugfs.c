// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counters, and a walk without a device:
 *
 *   /sys/kernel/debug/vballoon_walk/dry_run        write a smallest order, read
 *                                                  what the last walk found
 *   /sys/kernel/debug/vballoon_walk/<device>/stats counters of a device
 */
#include <linux/debugfs.h>
#include <linux/device.h>
#include <linux/ktime.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "debugfs.h"
#include "device.h"
#include "memmap.h"
#include "ranges.h"
#include "walk.h"

static struct dentry *root;

/* What the last dry run found; under dry_run_lock. */
static DEFINE_MUTEX(dry_run_lock);
static struct dry_run {
	struct free_walk walk;
	struct vbw_range range;
	u64 ranges;
	u64 duration_ns;
	int min_order;
	int result;
} last;

static int count_range(void *opaque, unsigned long pfn, unsigned long num)
{
	struct dry_run *run = opaque;

	if (vbw_range_join(&run->range, pfn, num))
		return 0;
	run->ranges++;
	run->range.pfn = pfn;
	run->range.num = num;
	return 0;
}

static int relax(void *opaque)
{
	cond_resched();
	return signal_pending(current) ? -EINTR : INT_MAX;
}

static int dry_run(int min_order)
{
	u64 started = ktime_get_ns();

	last = (struct dry_run){ .min_order = min_order, .walk.relax = relax };
	last.result = walk_free_mem_block_paced(&last, min_order, count_range, &last.walk);
	last.ranges += last.range.num != 0;
	last.duration_ns = ktime_get_ns() - started;
	return last.result;
}

static ssize_t dry_run_write(struct file *file, const char __user *buf, size_t len, loff_t *ppos)
{
	unsigned int min_order;
	int err;

	err = kstrtouint_from_user(buf, len, 0, &min_order);
	if (err)
		return err;
	if (min_order > VBW_MAX_ORDER)
		return -EINVAL;
	mutex_lock(&dry_run_lock);
	err = dry_run(min_order);
	mutex_unlock(&dry_run_lock);
	return err ? err : len;
}

static void show_walk(struct seq_file *m, const struct free_walk *walk)
{
	seq_printf(m, "blocks %llu\n", walk->blocks);
	seq_printf(m, "block_pages %llu\n", walk->pages);
	seq_printf(m, "slices %u\n", walk->slices);
	seq_printf(m, "longest_hold_ns %u\n", walk->longest_hold_ns);
	seq_printf(m, "overlong %u\n", walk->overlong);
	seq_printf(m, "zones %u\n", walk->zones);
}

static int dry_run_show(struct seq_file *m, void *unused)
{
	mutex_lock(&dry_run_lock);
	seq_printf(m, "min_order %d\n", last.min_order);
	seq_printf(m, "result %d\n", last.result);
	seq_printf(m, "duration_ns %llu\n", last.duration_ns);
	seq_printf(m, "ranges %llu\n", last.ranges);
	show_walk(m, &last.walk);
	mutex_unlock(&dry_run_lock);
	return 0;
}

static int dry_run_open(struct inode *inode, struct file *file)
{
	return single_open(file, dry_run_show, NULL);
}

static const struct file_operations dry_run_fops = {
	.owner = THIS_MODULE,
	.open = dry_run_open,
	.read = seq_read,
	.write = dry_run_write,
	.llseek = seq_lseek,
	.release = single_release,
};

static int stats_show(struct seq_file *m, void *unused)
{
	struct vbw_device *vb = m->private;
	struct vbw_session *session = &vb->session;

	seq_printf(m, "balloon_pages %u\n", READ_ONCE(vb->balloon.num_pages));
	seq_printf(m, "hinted_blocks %lu\n", READ_ONCE(vb->hinting.nr_blocks));
	seq_printf(m, "reporting %d\n", vb->reporting.on);
	seq_printf(m, "walk_queue %d\n", !!session->push.vq);
	if (!session->push.vq)
		return 0;
	seq_printf(m, "layout_id %u\n", vbw_memmap_layout_id());
	seq_printf(m, "layouts_sent %llu\n", session->layouts);
	seq_printf(m, "rounds %llu\n", session->rounds);
	seq_printf(m, "aborted %llu\n", session->aborted);
	seq_printf(m, "kicks %llu\n", session->push.kicks);
	seq_printf(m, "waits %llu\n", session->push.waits);
	seq_printf(m, "round %u\n", session->round);
	seq_printf(m, "result %d\n", session->result);
	seq_printf(m, "duration_ns %llu\n", session->duration_ns);
	seq_printf(m, "ranges %llu\n", session->push.sent_ranges);
	seq_printf(m, "pages %llu\n", session->push.sent_pages);
	show_walk(m, &session->walk);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

/**
 * vbw_debugfs_add - show a device
 * @vb: the device
 */
void vbw_debugfs_add(struct vbw_device *vb)
{
	vb->debugfs = debugfs_create_dir(dev_name(&vb->shared.vdev->dev), root);
	debugfs_create_file("stats", 0444, vb->debugfs, vb, &stats_fops);
}

/**
 * vbw_debugfs_remove - undo vbw_debugfs_add()
 * @vb: the device
 */
void vbw_debugfs_remove(struct vbw_device *vb)
{
	debugfs_remove_recursive(vb->debugfs);
}

/**
 * vbw_debugfs_init - once, when the module is loaded
 */
void vbw_debugfs_init(void)
{
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
	debugfs_create_file("dry_run", 0600, root, NULL, &dry_run_fops);
}

/**
 * vbw_debugfs_exit - undo vbw_debugfs_init()
 */
void vbw_debugfs_exit(void)
{
	debugfs_remove_recursive(root);
}
