// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free page reporting: the kernel isolates free blocks a few at a time, the
 * host discards them, then they go back to the free lists.
 */
#include <linux/page_reporting.h>
#include <linux/scatterlist.h>

#include "reporting.h"

/*
 * The smallest block to report. The kernel's own choice is a pageblock, which is
 * 512 MiB with pages of 64 KiB, so hardly any block would be that large; 2 MiB are
 * what virtio_balloon reports there.
 */
#if defined(CONFIG_ARM64_64K_PAGES)
#define REPORTING_ORDER 5
#elif defined(PAGE_REPORTING_ORDER_UNSPECIFIED)
#define REPORTING_ORDER PAGE_REPORTING_ORDER_UNSPECIFIED
#else
#define REPORTING_ORDER 0
#endif

static bool answered(struct virtqueue *vq)
{
	unsigned int len;

	return virtqueue_get_buf(vq, &len) || virtqueue_is_broken(vq);
}

static int report(struct page_reporting_dev_info *info, struct scatterlist *sg, unsigned int nents)
{
	struct vbw_reporting *reporting = container_of(info, struct vbw_reporting, info);
	struct virtqueue *vq = reporting->vq;
	int err;

	/* An empty queue has room for all of them, or is broken. */
	err = virtqueue_add_inbuf(vq, sg, nents, reporting, GFP_NOWAIT | __GFP_NOWARN);
	if (err)
		return err;
	virtqueue_kick(vq);
	wait_event(reporting->shared->acked, answered(vq));
	return virtqueue_is_broken(vq) ? -EIO : 0;
}

/**
 * vbw_reporting_start - begin to report, where the host wants it
 * @reporting: the queue
 *
 * Return: 0 or a negative error number.
 */
int vbw_reporting_start(struct vbw_reporting *reporting)
{
	unsigned int room;
	int err;

	if (!reporting->vq)
		return 0;
	room = virtqueue_get_vring_size(reporting->vq);
	memset(&reporting->info, 0, sizeof(reporting->info));
	reporting->info.report = report;
#ifdef VBW_HAVE_REPORTING_CAPACITY
	reporting->info.capacity = min_t(unsigned int, room, PAGE_REPORTING_CAPACITY);
#else
	if (room < PAGE_REPORTING_CAPACITY) {
		dev_err(&reporting->shared->vdev->dev, "reporting queue too small: %u entries, need %u\n",
			room, PAGE_REPORTING_CAPACITY);
		return -ENOSPC;
	}
#endif
	reporting->info.order = REPORTING_ORDER;
	err = page_reporting_register(&reporting->info);
	reporting->on = !err;
	return err;
}

/**
 * vbw_reporting_stop - undo vbw_reporting_start()
 * @reporting: the queue
 */
void vbw_reporting_stop(struct vbw_reporting *reporting)
{
	if (reporting->on)
		page_reporting_unregister(&reporting->info);
	reporting->on = false;
}
