// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free page reporting: the kernel isolates free blocks a few at a time, the
 * host discards them, then they go back to the free lists.
 */
#include <linux/page_reporting.h>
#include <linux/scatterlist.h>

#include "vbw.h"

static bool answered(struct virtqueue *vq)
{
	unsigned int len;

	return virtqueue_get_buf(vq, &len) || virtqueue_is_broken(vq);
}

static int report(struct page_reporting_dev_info *info, struct scatterlist *sg, unsigned int nents)
{
	struct vbw_device *vb = container_of(info, struct vbw_device, reporting);
	struct virtqueue *vq = vb->vqs[VBW_VQ_REPORTING];
	int err;

	/* An empty queue has room for all of them, or is broken. */
	err = virtqueue_add_inbuf(vq, sg, nents, vb, GFP_NOWAIT | __GFP_NOWARN);
	if (err)
		return err;
	virtqueue_kick(vq);
	wait_event(vb->acked, answered(vq));
	return virtqueue_is_broken(vq) ? -EIO : 0;
}

/**
 * vbw_reporting_start - begin to report, where the host wants it
 * @vb: the device
 *
 * Return: 0 or a negative error number.
 */
int vbw_reporting_start(struct vbw_device *vb)
{
	unsigned int room;
	int err;

	if (!vb->vqs[VBW_VQ_REPORTING])
		return 0;
	room = virtqueue_get_vring_size(vb->vqs[VBW_VQ_REPORTING]);
	memset(&vb->reporting, 0, sizeof(vb->reporting));
	vb->reporting.report = report;
#ifdef VBW_HAVE_REPORTING_CAPACITY
	vb->reporting.capacity = min_t(unsigned int, room, PAGE_REPORTING_CAPACITY);
#else
	if (room < PAGE_REPORTING_CAPACITY) {
		dev_err(&vb->vdev->dev, "reporting queue of %u entries is too small\n", room);
		return -ENOSPC;
	}
#endif
#ifdef PAGE_REPORTING_ORDER_UNSPECIFIED
	vb->reporting.order = PAGE_REPORTING_ORDER_UNSPECIFIED;
#endif
	err = page_reporting_register(&vb->reporting);
	vb->reporting_on = !err;
	return err;
}

/**
 * vbw_reporting_stop - undo vbw_reporting_start()
 * @vb: the device
 */
void vbw_reporting_stop(struct vbw_device *vb)
{
	if (vb->reporting_on)
		page_reporting_unregister(&vb->reporting);
	vb->reporting_on = false;
}
